"""All rules, in the order in which findings are listed."""

from __future__ import annotations

from edgeattn.export.support import (
    attribute_rules,
    function_rules,
    hazard_rules,
    model_rules,
    operator_rules,
    quantisation_rules,
    type_rules,
)
from edgeattn.export.support.rule import CallRule, ModelRule, NodeRule, Rule

RULES: tuple[Rule, ...] = (
    *model_rules.RULES,
    *function_rules.RULES,
    *operator_rules.RULES,
    *attribute_rules.RULES,
    *type_rules.RULES,
    *quantisation_rules.RULES,
    *hazard_rules.RULES,
)
"""Every rule, with unique ids."""

MODEL_RULES = tuple(rule for rule in RULES if isinstance(rule, ModelRule))
CALL_RULES = tuple(rule for rule in RULES if isinstance(rule, CallRule))
NODE_RULES = tuple(rule for rule in RULES if isinstance(rule, NodeRule))

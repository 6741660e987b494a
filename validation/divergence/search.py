"""The search for the first module whose error its inputs do not explain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from edgeattn.foundation import UserError
from edgeattn.validation.divergence.alignment import Alignment, align, calls_in, common_module
from edgeattn.validation.divergence.forms import Arrays, Observed, Outline, TorchForm, relative_l2
from edgeattn.validation.divergence.limits import Limit, Limits
from edgeattn.validation.divergence.onnx_form import OnnxForm, require_same_inputs
from edgeattn.validation.divergence.records import Divergence, OutputCheck, Point
from edgeattn.validation.divergence.reduction import Evidence
from edgeattn.validation.divergence.scopes import Place
from edgeattn.validation.divergence.segments import Segment, SegmentError, Walk

NETWORK = "(network)"
"""Stands for what belongs to no module but the network itself."""

_MOST_RESULTS = 6  # of one module call that are told apart by their values


@dataclass
class _Tally:
    """Running figures of one segment: errors are the largest over the samples."""

    total: float = 0.0
    inherited: float = 0.0
    local: float = 0.0
    limit: Limit | None = None
    failure: str | None = None

    def add(self, total: float, inherited: float, local: float, limit: Limit) -> None:
        self.total, self.inherited = max(self.total, total), max(self.inherited, inherited)
        if self.limit is None or _excess(local, limit) > _excess(self.local, self.limit):
            self.local, self.limit = local, limit


def _excess(error: float, limit: Limit) -> float:
    return error / limit.value if limit.value else (float("inf") if error else 0.0)


class Search:
    """Compares two forms sample by sample.

    One of them is taken apart: the ONNX form; of two, the one that computes more coarsely, because its own rounding is
    what a local error is held against; of two of one precision, the form under test. Both are computed once for each
    sample, and only those tensors are kept that a later part still reads.

    Args:
        reference: the form that counts as right.
        candidate: the form under test.

    Attributes:
        dissected: the one that is taken apart.
        observed: the other one.
        peak_bytes: the most bytes of tensors that were kept at one time, but for the evidence.

    Raises:
        UserError: neither is an ONNX form.
    """

    def __init__(self, reference: Observed, candidate: Observed) -> None:
        self.reference, self.candidate = reference, candidate
        dissected = max(
            (form for form in (candidate, reference) if isinstance(form, OnnxForm)), key=_coarseness, default=None
        )
        if dissected is None:
            raise UserError(
                f"neither {reference.name} nor {candidate.name} is an ONNX form, and one of the two has to be, to be "
                "taken apart. Give an .onnx file for one of them."
            )
        self.dissected: OnnxForm = dissected
        self.observed = reference if dissected is candidate else candidate
        self.peak_bytes = 0
        self.alignment: Alignment | None = None
        self.segments: list[Segment] = []
        self._limits = Limits(dissected.sessions)
        self._tallies: list[_Tally] = []
        self._outputs: dict[str, list[float]] = {}
        self._whole_failure: str | None = None
        self._folding: float | None = None
        self._notes: list[str] = []
        self._by = ""
        self._feed: Arrays = {}
        self._current: Arrays = {}
        self._rewired: dict[str, set[str]] = {}
        self._evidence: tuple[int, Evidence] | None = None

    def run(self, feeds: Iterable[Arrays], progress: Callable[[int], None] | None = None) -> Divergence:
        """Compare the forms.

        Args:
            feeds: inputs by name, one sample after the other.
            progress: called after each sample with the number of samples done.

        Raises:
            UserError: the forms take different inputs or give different outputs, or there is no sample.
        """
        done = 0
        for done, feed in enumerate(feeds, start=1):
            if done == 1:
                self._prepare(feed)
            self._compare(feed)
            if progress:
                progress(done)
        if not done:
            raise UserError("there is no sample to compare the forms on. Give at least one with --data.")
        return self._result(done)

    def _prepare(self, feed: Arrays) -> None:
        dissected, self._feed = self.dissected, feed
        if isinstance(self.observed, OnnxForm):
            require_same_inputs(dissected, list(self.observed.inputs), self.observed.name)
        outline = self.observed.outline(dissected.graph, dissected.feed(feed))
        by_name = any(place.side == "tensor" for place in outline.places)
        if not by_name and not dissected.graph.has_metadata:
            raise UserError(
                f"{dissected.path} does not say which torch module a node comes from, so nothing inside it can be "
                f"aligned with {self.observed.name}. Export it with torch.onnx.export(dynamo=True) or `edgeattn "
                "export`, or compare it with another ONNX form of the same model."
            )
        self._by = "tensor name" if by_name else "module path"
        if by_name:
            self._notes.append(
                "One of the forms has no torch module paths: tensors are aligned by their names instead."
            )
        places = dissected.named_places if by_name else dissected.module_places(calls_in(outline.places))
        outputs = {Place(name, 0, "network"): name for name in dissected.outputs}
        outline = Outline({**outline.places, **dict.fromkeys(outputs)}, outline.stand_ins, outline.leaves)
        self.alignment = align(outline, {**places, **outputs}, dissected.graph, dissected.dissection.shapes)
        if not isinstance(self.observed, OnnxForm):  # two graphs give the results of a module in the same order
            self.alignment = replace(self.alignment, places=self._in_order(self.alignment, feed))
        self.segments = dissected.cut(self.alignment.places)
        self._tallies = [_Tally() for _ in self.segments]
        if isinstance(self.observed, TorchForm):
            self._folding = self.observed.folding_error(feed)

    def _in_order(self, alignment: Alignment, feed: Arrays) -> dict[str, Place]:
        """Return the alignment with several results of one module call assigned to each other by their values.

        A module returns them in an order of its own, the graph computes them in another. Results that a fault has
        swapped are assigned the right way round here; what reads them diverges then.
        """
        groups: dict[tuple[str, int], list[str]] = {}
        for tensor, place in alignment.places.items():
            if place.side == "out":
                groups.setdefault((place.path, place.call), []).append(tensor)
        several = [tensors for tensors in groups.values() if 1 < len(tensors) <= _MOST_RESULTS]
        places = dict(alignment.places)
        theirs: dict[Place, np.ndarray] = {}
        wanted = [places[tensor] for tensors in several for tensor in tensors]
        if not wanted:
            return places
        self.observed.run(feed, wanted, lambda place, array: theirs.update({place: array}))
        try:
            ours = self.dissected.values(feed, [tensor for tensors in several for tensor in tensors])
        except SegmentError:
            return places
        for tensors in several:
            orders = permutations([places[tensor] for tensor in tensors])
            options = [dict(zip(tensors, order, strict=True)) for order in orders]
            costs = [sum(_unlike(theirs, ours, place, name) for name, place in option.items()) for option in options]
            places.update(options[costs.index(min(costs))])
        return places

    def _compare(self, feed: Arrays) -> None:
        """Run both forms on one sample; segments are judged as soon as all they need is there."""
        assert self.alignment is not None
        given, self._current = self.dissected.feed(feed), feed
        tensors: dict[Place, list[str]] = {}
        for name, place in self.alignment.places.items():
            tensors.setdefault(place, []).append(name)
        inputs = set(self.dissected.inputs)
        theirs, ours = (Walk(self.segments, self.dissected.outputs) for _ in range(2))
        arrived = set(inputs)
        waiting = iter(enumerate(self.segments))
        current = next(waiting, None)

        def take(name: str, array: np.ndarray) -> None:
            nonlocal current
            theirs.put(name, array)
            arrived.add(name)
            while current is not None and {current[1].output, *current[1].inputs} <= arrived:
                self._judge(*current, {**theirs.values, **_only(given, inputs)}, {**ours.values, **given}, ours)
                theirs.finish(current[1])
                ours.finish(current[1])
                current = next(waiting, None)

        def sink(place: Place, array: np.ndarray) -> None:
            if place in rewiring:
                name, module = rewiring[place]
                held = given.get(name, theirs.values.get(name))
                if held is not None and not np.array_equal(held, array, equal_nan=True):
                    self._rewired.setdefault(name, set()).add(module)
            for name in tensors.get(place, ()):
                take(name, array)

        rewiring = self.alignment.inputs
        wanted = [place for place in {**tensors, **rewiring} if place.side != "network"]
        outputs = self.observed.run(feed, wanted, sink)
        if absent := set(self.dissected.outputs) - set(outputs):
            raise UserError(
                f"{self.dissected.path} gives {', '.join(sorted(absent))}, and {self.observed.name} does not; it gives "
                f"{', '.join(outputs)}. Give two forms of one model with the same outputs."
            )
        for name in self.dissected.outputs:
            if name not in arrived and name in outputs:
                take(name, outputs[name])
        self.peak_bytes = max(self.peak_bytes, theirs.peak_bytes + ours.peak_bytes)
        self._compare_outputs(feed, outputs, ours.values)

    def _judge(self, index: int, segment: Segment, theirs: Arrays, ours: Arrays, walk: Walk) -> None:
        """Compare one segment's result, on the other form's inputs and on its own."""
        tally, wanted = self._tallies[index], theirs[segment.output]
        sessions = self.dissected.sessions
        try:
            on_theirs = sessions.run(segment, theirs)
            same = all(ours[name] is theirs[name] for name in segment.inputs)
            on_ours = on_theirs if same else sessions.run(segment, ours)
        except SegmentError as error:
            tally.failure = tally.failure or f"ONNX Runtime cannot run its nodes: {error}"
            self._keep(index, theirs, 0.0)
            walk.put(segment.output, wanted)  # what follows is judged on the other form's values
            return
        if on_theirs.shape != wanted.shape or on_ours.shape != wanted.shape:
            tally.failure = tally.failure or f"its result has shape {on_theirs.shape} instead of {wanted.shape}"
            self._keep(index, theirs, 0.0)
            walk.put(segment.output, wanted)
            return
        walk.put(segment.output, on_ours)
        local = relative_l2(wanted, on_theirs)
        limit = self._limits.limit(segment, theirs, local)
        if not local <= limit.value:
            self._keep(index, theirs, limit.value)
        tally.add(relative_l2(wanted, on_ours), relative_l2(on_theirs, on_ours, scale=wanted), local, limit)

    def _keep(self, index: int, theirs: Arrays, allowed: float) -> None:
        """Remember what the first divergent segment ran on."""
        if self._evidence is None or index < self._evidence[0]:
            segment = self.segments[index]
            inputs = {name: theirs[name] for name in segment.inputs}
            self._evidence = (
                index,
                Evidence(segment, inputs, theirs[segment.output], self._current, allowed),
            )

    @property
    def evidence(self) -> Evidence | None:
        """What the first divergent segment ran on when it first failed; None without divergence."""
        return self._evidence[1] if self._evidence else None

    def _compare_outputs(self, feed: Arrays, reference: Arrays, pieces: Arrays) -> None:
        """Compare the outputs of the form in one piece with those of its segments."""
        try:
            whole = self.dissected.unmarked(feed)
        except SegmentError as error:
            self._whole_failure = str(error)
            return
        for name in self.dissected.outputs:
            if name not in reference or pieces[name].shape != whole[name].shape:
                continue
            difference = relative_l2(whole[name], pieces[name])
            limit = self._limits.limit(self.dissected.whole, self.dissected.feed(feed), difference)
            fits = whole[name].shape == reference[name].shape
            found = [
                relative_l2(reference[name], pieces[name]) if fits else float("inf"),
                relative_l2(reference[name], whole[name]) if fits else float("inf"),
                difference,
                limit.value,
            ]
            known = self._outputs.setdefault(name, found)
            self._outputs[name] = [max(pair) for pair in zip(known, found, strict=True)]

    def _result(self, samples: int) -> Divergence:
        assert self.alignment is not None
        notes = list(self._notes)
        if self._whole_failure:
            notes.append(f"ONNX Runtime cannot run {self.dissected.name} as one graph: {self._whole_failure}")
        if self.dissected is self.reference:
            why = "computes more finely" if isinstance(self.candidate, OnnxForm) else "cannot be taken apart"
            notes.append(f"{self.candidate.name} {why}: the nodes of {self.reference.name} ran on its tensors.")
        return Divergence(
            reference=self.reference.name,
            candidate=self.candidate.name,
            dissected=self.dissected.name,
            aligned_by=self._by,
            samples=samples,
            points=tuple(self._point(*pair) for pair in zip(self.segments, self._tallies, strict=True)),
            outputs=tuple(OutputCheck(name, *values) for name, values in self._outputs.items()),
            unaligned=self.alignment.unaligned,
            folding_error=self._folding,
            notes=tuple(notes),
            measured=self.dissected.facts.measured,
        )

    def _missing(self, segment: Segment) -> tuple[str, ...]:
        """Return the modules of the other form that belong to a segment and have no node in it."""
        assert self.alignment is not None
        end = self.alignment.places.get(segment.output)
        candidates = self.alignment.missing_between(segment.inputs, segment.output)
        if end is None:
            return ()
        return tuple(dict.fromkeys(place.path for place in candidates if self.observed.depends(self._feed, end, place)))

    def _before(self, segment: Segment) -> str:
        """Return the module to name for a segment: its own, unless that reads what the other form's does not.

        Then something in front of it is lost or wired otherwise, in the module around it.
        """
        rewired = set().union(*(self._rewired.get(name, set()) for name in segment.inputs))
        module = segment.owner
        if module not in rewired:
            return module
        while module in rewired:
            module = module.rpartition(".")[0]
        return module

    def _point(self, segment: Segment, tally: _Tally) -> Point:
        assert self.alignment is not None
        place = self.alignment.places.get(segment.output)
        limit = tally.limit or Limit(0.0, "not derived")
        missing: tuple[str, ...] = ()
        module = segment.owner
        if tally.failure or not tally.local <= limit.value:
            missing = self._missing(segment)
            module = common_module(missing) if missing else self._before(segment)
        fallback = segment.output if self._by == "tensor name" else NETWORK
        return Point(
            module=module or fallback,
            call=place.call + 1 if place and module == place.path else 1,
            tensor=segment.output,
            modules=tuple(path or NETWORK for path in segment.modules),
            missing=missing,
            parameters=tuple(tensor.name for tensor in segment.model.graph.initializer if len(tensor.dims) > 0),
            total=tally.total,
            inherited=tally.inherited,
            local=tally.local,
            limit=limit.value,
            derivation=limit.derivation,
            failure=tally.failure,
        )


def _coarseness(form: OnnxForm) -> int:
    return ("fp32", "fp16", "bf16", "int8").index(form.precision)


def _unlike(theirs: Mapping[Place, np.ndarray], ours: Arrays, place: Place, tensor: str) -> float:
    """Return how little two tensors resemble each other, from 0 to 2 where the shapes agree, and more where not."""
    left, right = theirs[place], ours[tensor]
    return min(relative_l2(left, right), 2.0) if left.shape == right.shape else 3.0


def _only(arrays: Arrays, names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: arrays[name] for name in names if name in arrays}


def bisect(
    reference: Observed,
    candidate: Observed,
    feeds: Iterable[Arrays],
    *,
    progress: Callable[[int], None] | None = None,
) -> Divergence:
    """Find the first module of one form that diverges from another, see `edgeattn.validation.divergence.records`.

    Args:
        reference: the form that counts as right.
        candidate: the form under test.
        feeds: inputs by name, one sample after the other; one pass over them is made.
        progress: called after each sample with the number of samples done.

    Raises:
        UserError: the forms are not two forms of one model, neither is an ONNX form, or there is no sample.
    """
    return Search(reference, candidate).run(feeds, progress)

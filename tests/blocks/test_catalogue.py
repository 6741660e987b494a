"""The generated catalogue."""

from pathlib import Path

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.catalogue import catalogue

PAGE = Path(__file__).parents[2] / "docs" / "blocks.md"


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text() == catalogue(), "run `make docs`"


def test_every_block_and_variant_is_on_the_page() -> None:
    page = catalogue()
    for spec in BLOCKS:
        assert f"## {spec.name}\n" in page
        for variant in spec.variants:
            assert f"| {variant.name} |" in page

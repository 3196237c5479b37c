"""What the words of a licence forbid, however they are written."""

from __future__ import annotations

import pytest

from minilm.orchestrator.resolve.licences import card_of, licence_of, limit_of


@pytest.mark.parametrize(
    "licence",
    [
        "cc-by-nc-4.0",
        "CC BY-NC 4.0",
        "cc_by_nc_sa_4.0",
        "cc-by-nc4.0",
        "Non Commercial",
        "intel-research",
        ["mit", "cc-by-nc-2.0"],
    ],
)
def test_commercial_use_is_forbidden(licence):
    assert "forbids commercial use" in limit_of(licence)


@pytest.mark.parametrize("licence", ["cc-by-nd-4.0", "CC BY-NC-ND 4.0", "No Derivatives", "no-derivatives"])
def test_derived_works_are_forbidden(licence):
    assert "allows no derived works" in limit_of(licence)


@pytest.mark.parametrize(
    "licence",
    [None, "apache-2.0", "mit", "ncsa", "odc-by", "openrail", "cc-by-sa-4.0", "cdla-permissive-2.0"],
)
def test_nothing_is_forbidden(licence):
    assert limit_of(licence) == ""


def test_a_licence_that_the_hub_does_not_list_is_known_by_its_name(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: some-nc-licence\n---\n")
    assert "forbids commercial use" in limit_of(licence_of(card_of(tmp_path)))

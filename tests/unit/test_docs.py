"""The documents keep up with the code."""

import re

import pytest
from conftest import PROJECT
from personalization.local.config import StackConfig
from personalization.settings import Settings

README = (PROJECT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted({*Settings.model_fields, *StackConfig.model_fields}))
def test_the_readme_names_every_setting(name: str) -> None:
    assert f"`{name.upper()}" in README


@pytest.mark.parametrize("name", sorted(set(Settings.model_fields)))
def test_the_readme_tells_the_true_default(name: str) -> None:
    lines = [line for line in README.splitlines() if line.startswith("|") and f"`{name.upper()}`" in line]
    line = lines[-1]
    default = Settings.model_fields[name].default
    text = default.get_secret_value() if hasattr(default, "get_secret_value") else str(default)
    if default is None or not text:
        assert "none" in line
    else:
        assert f"`{text.removesuffix('.0')}`" in line


@pytest.mark.parametrize(
    "document", ["README.md", "architecture.md", "scaling_plan.md", "CONTRIBUTING.md", "docs/dashboard.md"]
)
def test_links_and_pictures_lead_somewhere(document: str) -> None:
    content = (PROJECT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", content):
        assert (PROJECT / document).parent.joinpath(target).exists(), target


def test_the_readme_names_every_make_target() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    shown = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    contributing = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in shown - {"help", "format", "bench"}:
        assert re.search(rf"make (\w+ )*{target}\b", README + contributing), target

from dataclasses import dataclass
from typing import Literal

import pytest

from hpc import config
from hpc.config import option, section
from hpc.errors import UserError


@dataclass(frozen=True)
class Inner:
    lr: float = option(0.1, "Rate.", low=0.0)
    widths: list[int] = option([1, 2], "Widths.", low=1)
    pair: tuple[float, float] = option((0.0, 1.0), "Pair.")
    workers: int = option(2, "Threads.", how=True)

    def check(self):
        if self.lr == 13:
            raise ValueError("lr 13 is unlucky")


@dataclass(frozen=True)
class Recipe:
    name: Literal["a", "b"] = option("a", "Kind.")
    steps: int | None = option(None, "Steps.")
    fast: bool = option(False, "Speed.")
    extra: dict[str, object] = option({}, "More.")
    inner: Inner = section(Inner)
    machine: Inner = section(Inner, how=True)


def made(*overrides):
    return config.build(Recipe, config.apply_overrides({}, list(overrides)))


def test_overrides_and_round_trip():
    recipe = made("inner.lr=1e-3", "name=b", "steps=5", "inner.widths=[3, 4]", "inner.pair=[1, 2]", "extra.x=1")
    assert (recipe.inner.lr, recipe.name, recipe.steps) == (1e-3, "b", 5)
    assert recipe.inner.widths == [3, 4] and recipe.inner.pair == (1.0, 2.0) and recipe.extra == {"x": 1}
    assert config.build(Recipe, config.parse_yaml(config.to_yaml(recipe), "x")) == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inner.lrr=1", "'inner.lrr' does not exist (did you mean 'inner.lr'?); allowed here: lr, widths"),
        ("nmae=b", "did you mean 'name'"),
        ("name=c", "'name' is 'c'; allowed: a, b"),
        ("steps=many", "'steps' must be a whole number, not 'many'"),
        ("steps=true", "'steps' must be a whole number"),
        ("fast=1", "'fast' must be true or false"),
        ("inner.lr=-1", "'inner.lr' is -1.0; it must be at least 0.0"),
        ("inner.lr=nan", "'inner.lr' must be a finite number, not nan"),
        ("inner.lr=.inf", "'inner.lr' must be a finite number, not inf"),
        ("name=[a]", "'name' is ['a']; allowed: a, b"),
        ("name=2024-13-45", "'name' is '2024-13-45'; allowed: a, b"),
        ("inner.widths=3", "'inner.widths' must be a list"),
        ("inner.widths=[0]", "'inner.widths[0]' is 0; it must be at least 1"),
        ("inner.pair=[1]", "must have 2 values, not 1"),
        ("inner=3", "section 'inner' must be a mapping"),
        ("inner.lr=13", "section 'inner': lr 13 is unlucky"),
        ("steps", "must look like section.key=value"),
        ("steps.x.y=3", "does not exist|must be a whole number"),
    ],
)
def test_mistakes_are_one_sentence(override, said):
    with pytest.raises(UserError, match="|".join(map(__import__("re").escape, said.split("|")))) as error:
        made(override)
    assert "\n" not in str(error.value)


def test_bad_yaml_names_the_line():
    with pytest.raises(UserError, match="line 2"):
        config.parse_yaml("a: 1\nb: [", "recipe x")
    with pytest.raises(UserError, match="must hold keys and values"):
        config.parse_yaml("- 1", "recipe x")
    with pytest.raises(UserError, match=r"recipe x is not valid YAML: key 'a' stands twice.*line 3"):
        config.parse_yaml("a: {b: 1}\nc: 2\na: {b: 3}", "recipe x")
    assert config.parse_yaml("base: &x {a: 1}\nc: {<<: *x, b: 2}\nd: 2024-05-01", "x")["d"] == "2024-05-01"


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "r.yaml").write_bytes("name: \xb5".encode("latin-1"))
    with pytest.raises(UserError, match=r"recipe .*r\.yaml is not UTF-8"):
        config.read_yaml(tmp_path / "r.yaml", "recipe")


def test_how_is_not_in_the_fingerprint_and_what_is():
    base = config.fingerprint(made(), store="h")
    assert config.fingerprint(made("inner.workers=9", "machine.lr=2"), store="h") == base
    assert config.fingerprint(made("inner.lr=2"), store="h") != base
    assert config.fingerprint(made(), store="other") != base


def test_changes_name_keys_and_values():
    old, new = config.to_dict(made()), config.to_dict(made("inner.lr=2", "name=b"))
    assert config.changes(old, new) == ["name: a -> b", "inner.lr: 0.1 -> 2.0"]


def test_a_section_may_expand_what_was_written():
    @dataclass(frozen=True)
    class Named:
        lr: float = option(0.1, "Rate.")

        @classmethod
        def expand(cls, values):
            given = dict(values)
            if given.pop("named", "fast") != "fast":
                raise ValueError("named is not fast")
            return {"lr": 7.0, **given} if "named" in values else given

    @dataclass(frozen=True)
    class Outer:
        inner: Named = section(Named)

    built = config.build(Outer, {"inner": {"named": "fast"}})
    assert built.inner.lr == 7.0 and config.to_dict(built) == {"inner": {"lr": 7.0}}
    assert config.fingerprint(built) == config.fingerprint(config.build(Outer, {"inner": {"lr": 7}}))
    assert config.build(Outer, {"inner": {"named": "fast", "lr": 3}}).inner.lr == 3.0
    with pytest.raises(UserError, match="section 'inner': named is not fast"):
        config.build(Outer, {"inner": {"named": "slow"}})
    with pytest.raises(UserError, match=r"'inner\.nam' does not exist"):
        config.build(Outer, {"inner": {"nam": "fast"}})

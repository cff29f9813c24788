"""What is leaned on in other packages is where it was."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dng_models.pipelines import guider
from tests.helpers import private

ROOT = Path(guider.__file__).parent


@pytest.mark.parametrize("name", private.NAMES)
def test_a_private_name_is_still_there(name: str) -> None:
    if name in private.GUIDER and guider.GuiderOutput is None:
        pytest.skip("guiders are supported from diffusers 0.36 on")
    assert private.missing((name,)) == []


def test_a_name_that_moved_is_told() -> None:
    gone = (
        "diffusers.hooks:HookRegistry.attach",
        "diffusers.hocks:HookRegistry",
        "diffusers.hooks:ModelHook().original_forward",
    )
    assert private.missing(("diffusers.hooks:ModelHook", *gone)) == list(gone)


def test_hooks_leave_the_marks_that_are_looked_for() -> None:
    # Attributes that only appear on instances, and that a name alone cannot find.
    import torch
    from diffusers.hooks import HookRegistry, ModelHook

    module = torch.nn.Linear(1, 1)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    assert module._diffusers_hook is registry
    hook = ModelHook()
    hook.new_forward = lambda module, x: x
    forward = module.forward
    registry.register_hook(hook, "name")
    assert hook.fn_ref.original_forward == forward
    assert torch.compile(module, backend="eager")._orig_mod is module


def test_nothing_else_private_is_imported() -> None:
    """Whoever takes a private name of diffusers adds it to the list."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers"):
                listed = {name.partition(":")[2].split(".")[0] for name in private.NAMES}
                deep = (node.module or "").count(".") > 1
                for alias in node.names:
                    assert not alias.name.startswith("_"), (path, alias.name)
                    assert not deep or alias.name in listed, (path, node.module, alias.name)

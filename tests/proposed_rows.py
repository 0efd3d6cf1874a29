"""The row of a dense model type, as a tiny model of it has it: found by what its parts do.

Which tensors carry the intermediate size, and along which dimension, is seen by another size; gate
and up are told apart by what turning their signs does; the norm before the MLP is what put out its
input. Names are only where one looks first.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import random_weight, read_tensors, sizes_of
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.activations import ACT2CLS

from upcycle_cli.models import dense_rows
from upcycle_cli.models.dense import DenseFamily
from upcycle_cli.models.mlp import BIAS, Weight, linear_layers, swiglu

UNMADE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(RuntimeError, StrictDataclassError, TypeError, ValueError),
)
"""What transformers raises of sizes that go with no model of a type."""
USUAL = ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
WIDTHS = ("intermediate", "inner", "ffn", "ff", "mlp")
"""Parts of the names of keys that may be the intermediate size, and are tried first."""
UNSEEN = "targets, old_keys"
"""What no model shows."""
TINY = 10**7
"""Parameters of the largest model that is made."""
COLUMNS = 76
"""How wide a row may be that is printed four columns to the right."""


class UntoldError(Exception):
    """Why there is no row to propose, in words."""


@dataclass(frozen=True)
class Proposal:
    row: DenseFamily
    look_at: tuple[str, ...]
    """What a person has to look at, since it was not measured."""
    layer: Mapping[str, tuple[int, ...]]
    """The tensors of a layer that has an MLP."""

    def __str__(self) -> str:
        usual = DenseFamily("")
        values = {field.name: getattr(self.row, field.name) for field in fields(DenseFamily)[2:]}
        said = [quoted(self.row.model_type), quoted(self.row.classes)] + [
            f"{name}={mlp_said(value) if name == 'mlp' else quoted(value)}"
            for name, value in values.items()
            if value != getattr(usual, name)
        ]
        line = f"DenseFamily({', '.join(said)})"
        if len(line) <= COLUMNS and "\n" not in line:
            return line
        return "DenseFamily(\n" + "".join(f"    {part},\n" for part in said) + ")"


def quoted(value: object) -> str:
    """Write a value as ruff does, a long mapping an item to a line."""
    said = repr(value).replace("'", '"')
    if isinstance(value, dict) and len(said) > COLUMNS - 16:
        rows = (f"        {quoted(key)}: {quoted(held)},\n" for key, held in value.items())
        return f"{{\n{''.join(rows)}    }}"
    return said


def mlp_said(mlp: tuple[Weight, ...]) -> str:
    """Write an MLP as rows do: by the name that it has there, or by its layers."""
    for name, value in vars(dense_rows).items():
        if value == mlp:
            return name
    layers = {w.parts[0]: w.name.removesuffix(".weight") for w in mlp if not w.is_bias}
    names = [layers.get(part, "") for part in ("gate", "up", "down")]
    inside = names[-1].removesuffix(".down_proj")
    if mlp == swiglu(inside):
        return f'swiglu("{inside}")'
    for turned in (False, True):
        if mlp == linear_layers(*names, transposed=turned):
            listed = ", ".join(map(quoted, names))
            return f"linear_layers({listed}{', transposed=True' if turned else ''})"
    rows = (f"        Weight({quoted(w.name)}, {quoted(w.parts)}, {w.split_dim}),\n" for w in mlp)
    return f"(\n{''.join(rows)}    )"


# Tiny models -------------------------------------------------------------------------------------


def tiny(model_type: str, device: str = "cpu", **changes: Any) -> Any:  # noqa: ANN401
    """Make a tiny model; UntoldError where there is none of these sizes."""
    try:
        sizes = {**sizes_of(model_type), "tie_word_embeddings": False, **changes}
        return made(CONFIG_MAPPING[model_type](**sizes), device).eval()
    except UNMADE as error:
        raise UntoldError(f"no tiny model can be made: {in_words(error)}") from error


def made(config: Any, device: str) -> Any:  # noqa: ANN401 - transformers is untyped
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")  # of sizes that nobody trains
        return AutoModelForCausalLM.from_config(config)


def in_words(error: Exception) -> str:
    """Return what an error says, without the lines that only lead to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines[1:] if "Error:" in line), lines[0] if lines else repr(error)
    )


def with_weights(model_type: str) -> Any:  # noqa: ANN401 - transformers is untyped
    if sum(p.numel() for p in tiny(model_type, "meta").parameters()) > TINY:
        raise UntoldError("no tiny model can be made: it has other keys that say its sizes")
    model, generator = tiny(model_type), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, parameter.shape, generator)
    return model


def on_disk(model: Any) -> dict[str, str]:  # noqa: ANN401
    """Return the names that a model's tensors have in a file, by those in memory."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except UNMADE as error:
            raise UntoldError(f"a tiny model is not saved: {in_words(error)}") from error
        saved = read_tensors(Path(folder))
    found = {}
    for name, value in model.state_dict().items():
        same = [n for n, v in saved.items() if v.shape == value.shape and torch.equal(v, value)]
        found[name] = name if name in same or len(same) != 1 else same[0]
    return found


@dataclass
class Run:
    """What a layer's MLP was given in a model's run, and who put that out."""

    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] | None = None
    before: str | None = None
    """The module of the layer whose output it was."""


def watched(model: Any, layer: nn.Module, mlp: nn.Module) -> Run:  # noqa: ANN401
    """Run a model, and return what its MLP was given."""
    run = Run()
    outputs: list[tuple[str, torch.Tensor]] = []

    def entered(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        run.arguments, run.options = arguments, options
        given = next(v for v in (*arguments, *options.values()) if isinstance(v, torch.Tensor))
        same = (n for n, out in outputs if out.numel() == given.numel())
        tensors = dict(outputs)
        found = [n for n in same if torch.equal(tensors[n].flatten(), given.flatten())]
        weighed = [n for n in found if getattr(layer.get_submodule(n), "weight", None) is not None]
        run.before = next(iter(weighed or found), None)

    with ExitStack() as stack:
        for name, module in layer.named_modules():
            if name:
                stack.enter_context(hooked(module, name, outputs))
        stack.callback(mlp.register_forward_pre_hook(entered, with_kwargs=True).remove)
        try:
            with torch.no_grad():
                model(torch.arange(2, 10)[None])
        except UNMADE as error:
            raise UntoldError(f"a tiny model does not run: {in_words(error)}") from error
    return run


@contextmanager
def hooked(module: nn.Module, name: str, outputs: list[tuple[str, torch.Tensor]]) -> Iterator[None]:
    def left(_: nn.Module, __: object, out: object) -> None:
        if isinstance(out, torch.Tensor):
            outputs.append((name, out))

    handle = module.register_forward_hook(left)
    yield
    handle.remove()


# What it says ------------------------------------------------------------------------------------


def proposed(model_type: str) -> Proposal:
    """Return the row that a tiny model of a type has; UntoldError with the reason for none."""
    model = with_weights(model_type)
    config, names = model.config, on_disk(model)
    path, layers = layers_of(model)
    width_key, cuts = width_of(model_type, model, path)
    index, changed = next(iter(cuts.items()))
    layer = layers[index]
    inside = next(iter(changed)).rpartition(".")[0]
    while not all(name.startswith(f"{inside}.") for name in changed):
        inside = inside.rpartition(".")[0]
        if not inside:
            raise UntoldError("its layers hold the MLP's matrices themselves")
    mlp = layer.get_submodule(inside)
    run = watched(model, layer, mlp)
    if run.options is None:
        raise UntoldError(f"its {inside} was not called as a module")

    before = f"{path}.{index}."
    first = names[before + next(iter(changed))]
    prefix = first.partition(f".{index}.")[0]
    inner = {n: names[before + n].partition(f".{index}.")[2] for n, _ in layer.named_parameters()}
    cut = {n.removeprefix(f"{inside}."): dimension for n, dimension in changed.items()}
    named = {n: inner[f"{inside}.{n}"] for n, _ in mlp.named_parameters()}
    asked = partial(biases_of, config, f"{before}{inside}.")
    weights, width, notes = mlp_of(mlp, run, cut, named, asked)
    norm, offset = norm_of(layer, run.before)
    keys = {usual: config.attribute_map.get(usual, usual) for usual in USUAL}
    keys["intermediate_size"] = config.attribute_map.get(width_key, width_key)
    kinds = {tuple((n, p.shape) for n, p in other.named_parameters()) for other in layers}
    named_by = {id(p): names[n] for n, p in model.named_parameters()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (named_by.get(id(getattr(end, "weight", None))) for end in ends)
    if embedding is None or head is None:
        raise UntoldError("its embedding or its head is no layer by itself")
    row = DenseFamily(
        model_type,
        mlp=weights,
        norm=None if norm is None else inner[norm],
        norm_offset=offset,
        layer=f"{prefix}.{{layer}}.",
        embedding=embedding,
        head=head,
        activation=activation_of(config, f"{before}{inside}", mlp, run),
        keys={usual: key for usual, key in sorted(keys.items()) if usual != key},
        layers_differ=len(kinds) > 1,
        classes=classes_of(model),
    )
    if getattr(config, width_key) != width:
        notes.append(f"width ({width}, where {width_key} is {getattr(config, width_key)})")
    if windows := [key for key in config.to_dict() if "window" in key or key == "layer_types"]:
        notes.append(f"windows ({', '.join(windows)})")
    if moved := renamed(names, path, prefix):
        notes.append(f"renamed ({moved})")
    shapes = {inner[n]: tuple(p.shape) for n, p in layer.named_parameters()}
    return Proposal(row, (*notes, UNSEEN), shapes)


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:  # noqa: ANN401
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UntoldError("its layers are in no list")


def width_of(model_type: str, model: nn.Module, path: str) -> tuple[str, dict[int, dict[str, int]]]:
    """Return the key of the intermediate size, and by layer the dimension that it is of tensors."""
    usual = {name: p.shape for name, p in model.named_parameters()}
    config: Any = model.config
    said = {k: v for k, v in config.to_dict().items() if v is None or type(v) is int}
    hints = sorted(said, key=lambda key: next((i for i, w in enumerate(WIDTHS) if w in key), 9))
    mapped = ("intermediate_size",) if "intermediate_size" in config.attribute_map else ()
    for key in (*mapped, *hints):
        try:
            other = tiny(model_type, "meta", **{key: 2 * (said.get(key) or 48)})
        except UntoldError:
            continue
        cuts: dict[int, dict[str, int]] = {}
        for name, parameter in other.named_parameters():
            if usual.get(name) in (None, parameter.shape):
                continue
            sizes = zip(usual[name], parameter.shape, strict=True)
            cut = [dimension for dimension, (one, two) in enumerate(sizes) if one != two]
            number, _, inner = name.removeprefix(f"{path}.").partition(".")
            if not name.startswith(f"{path}.") or len(cut) != 1:
                break
            cuts.setdefault(int(number), {})[inner] = cut[0]
        else:
            wide = {i: found for i, found in sorted(cuts.items()) if len(found) > 1}
            if wide:
                return key, wide
    raise UntoldError("no key of its config is the width of MLPs alone")


def biases_of(config: Any, before: str) -> set[str]:  # noqa: ANN401
    """Return which biases an MLP can have, by flipping what says so; `before` begins its names."""
    said = config.to_dict()
    flipped = {key: True for key, value in said.items() if value is False and "bias" in key}
    names = (name for name, _ in tiny(config.model_type, "meta", **flipped).named_parameters())
    return {n.removeprefix(before) for n in names if n.startswith(before) and n.endswith("bias")}


def mlp_of(
    mlp: nn.Module,
    run: Run,
    cut: Mapping[str, int],
    named: Mapping[str, str],
    biases: Callable[[], set[str]],
) -> tuple[tuple[Weight, ...], int, list[str]]:
    """Return an MLP's weights, how wide it is, and what of it is no matrix and no bias.

    `cut` has the dimensions that count the intermediate size, and `named` the names in files;
    `biases` says which biases there can be.
    """
    matrices = {name: d for name, d in cut.items() if mlp.get_parameter(name).ndim == 2}
    if len(matrices) not in (2, 3):
        raise UntoldError(f"its MLP has {len(matrices)} matrices, not two or three")
    outputs: list[tuple[str, torch.Tensor]] = []
    answer = answering(mlp, run)
    with ExitStack() as stack:
        for name in matrices:
            owner = name.rpartition(".")[0]
            stack.enter_context(hooked(mlp.get_submodule(owner), owner, outputs))
        usual = answer()
    widths = {name: dict(outputs)[name.rpartition(".")[0]].shape[-1] for name in matrices}
    entering = [n for n, cut in matrices.items() if mlp.get_parameter(n).shape[cut] == widths[n]]
    leaving = [name for name in matrices if name not in entering]
    if len(leaving) != 1:
        raise UntoldError(f"of its MLP's matrices, {len(leaving)} leave the intermediate size")
    (down,) = leaving
    width = mlp.get_parameter(down).shape[matrices[down]]
    holds = {n: parts_of(mlp.get_parameter(n), matrices[n], width, usual, answer) for n in entering}
    found = sorted(part for held in holds.values() for part in held)
    if len(found) == 1:
        holds = dict.fromkeys(entering, ("up",))  # what no gate is beside is not linear
    elif found != ["gate", "up"]:
        raise UntoldError(f"which of {', '.join(entering)} is gate or up was not seen")
    holds = dict(sorted(holds.items(), key=lambda item: item[1])) | {down: ("down",)}
    weights = [Weight(named[name], held, matrices[name]) for name, held in holds.items()]
    # Layers of their own are said to have biases whether they can or not.
    possible = biases() if len(holds) == 2 and len(found) == 2 else None
    for name, held in holds.items():
        if possible is None or f"{name.removesuffix('weight')}bias" in possible:
            bias = f"{named[name].removesuffix('weight')}bias"
            parts = tuple(part + BIAS for part in held)
            weights.append(Weight(bias, parts, None if name == down else 0))
    known = {weight.name for weight in weights}
    return tuple(weights), width, [name for name in named.values() if name not in known]


def answering(mlp: nn.Module, run: Run) -> Callable[[], torch.Tensor]:
    """Return what calls an MLP with what it was given, its biases left out."""

    def answer() -> torch.Tensor:
        with torch.no_grad():
            for name, parameter in mlp.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
            out = mlp(*run.arguments, **(run.options or {}))
        if not isinstance(out, torch.Tensor):
            raise UntoldError("its MLP puts out more than a tensor")
        return out

    return answer


def parts_of(
    matrix: torch.Tensor,
    cut: int,
    width: int,
    usual: torch.Tensor,
    answer: Callable[[], torch.Tensor],
) -> tuple[str, ...]:
    """Return what the blocks of a matrix are: the MLP's output turns its sign with that of up."""
    found = []
    for block in torch.split(matrix.data, width, cut):
        block.neg_()
        found.append("up" if torch.allclose(answer(), -usual, atol=1e-4) else "gate")
        block.neg_()
    return tuple(found)


def norm_of(layer: nn.Module, name: str | None) -> tuple[str | None, float]:
    """Return the weight of the norm that put out an MLP's input, and what is added to it."""
    module = None if name is None else layer.get_submodule(name)
    weight = getattr(module, "weight", None)
    if module is None or weight is None:
        return None, 0.0
    with torch.no_grad():
        for bias in (p for n, p in module.named_parameters() if n.endswith("bias")):
            bias.zero_()
        given = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0))
        weight.zero_()
        without = module(given)
        weight.fill_(1.0)
        plain = module(given) - without
    return f"{name}.weight", round(float((without * plain).sum() / (plain * plain).sum()), 2)


def activation_of(config: Any, path: str, mlp: nn.Module, run: Run) -> str | None:  # noqa: ANN401
    """Return the key that changes what an MLP puts out; None where no name of one does."""
    usual = answering(mlp, run)()
    for key, value in config.to_dict().items():
        if isinstance(value, str) and value in ACT2CLS:
            other = tiny(config.model_type, "meta", **{key: "tanh" if value != "tanh" else "relu"})
            changed = other.get_submodule(path).to_empty(device="cpu")
            changed.load_state_dict(mlp.state_dict(), strict=False)
            if not torch.allclose(answering(changed, run)(), usual):
                return str(key)
    return None


def classes_of(model: Any) -> str | tuple[str, str, str]:  # noqa: ANN401
    names = tuple(type(m).__name__ for m in (model.config, model.base_model, model))
    prefix = names[0].removesuffix("Config")
    usual = (f"{prefix}Config", f"{prefix}Model", f"{prefix}ForCausalLM")
    return prefix if names == usual else names  # type: ignore[return-value]


def renamed(names: Mapping[str, str], path: str, prefix: str) -> str:
    """Say which tensors have other names in memory, but for how those of layers begin."""
    found = {}
    for memory, disk in names.items():
        inner = disk.replace(f"{prefix}.", f"{path}.", 1) if disk.startswith(prefix) else disk
        if inner != memory:
            number = r"\.\d+\."
            found[re.sub(number, ".0.", disk)] = re.sub(number, ".0.", memory)
    said = [f"{disk} is {memory}" for disk, memory in found.items()]
    return ", ".join(said if len(said) < 3 else (*said[:1], f"and {len(said) - 1} more"))

"""A dense model whose MLPs were turned into experts: the code of its config and of its classes.

It lies beside the weights as `modeling_upcycled.py`, since transformers has no Mixture-of-Experts
class for this family. It takes attention, norms and embeddings from the dense family's own classes,
and the form of the MLP (gated or not, biases, activation, dropout) from the dense MLP it replaces.
The three imports that end in "as Dense..." are all that differs between families. Where they are of
a model that has a text model inside, only the layers of that one get experts.

Legend: B batch, S positions, T tokens (B·S), H hidden size, N experts, I an expert's intermediate
size, K experts per token.
"""

# ruff: noqa: ANN401, SLF001 - transformers has no types, and its switches are private.

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import NemotronConfig as DenseConfig
from transformers import NemotronForCausalLM as DenseForCausalLM
from transformers import NemotronModel as DenseModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

try:
    from transformers.integrations.moe import use_experts_implementation

    with_implementations = use_experts_implementation(has_gate=True)
except (ImportError, TypeError):  # transformers 4, and releases of 5 that know gated experts only
    with_implementations = None

ROUTINGS = ("topk-softmax", "softmax-topk", "sigmoid-topk")


class UpcycledConfig(DenseConfig):  # type: ignore[misc]
    """The dense family's config, plus what its experts and their router are."""

    model_type = f"upcycled_{DenseConfig.model_type}"

    def __init__(
        self,
        *,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int | None = None,
        routing: str = "softmax-topk",
        routed_scaling_factor: float = 1.0,
        moe_layers: list[int] | None = None,
        virtual_group_size: int = 1,
        router_aux_loss_coef: float = 0.01,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        text: Any = self.get_text_config()  # itself, unless there is a text model inside
        settings = {
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "moe_intermediate_size": moe_intermediate_size
            or getattr(text, "intermediate_size", None),
            "routing": routing,
            "routed_scaling_factor": routed_scaling_factor,
            "moe_layers": list(range(text.num_hidden_layers)) if moe_layers is None else moe_layers,
            # Experts that hold the parts of one MLP, whose router rows get the mean of their
            # gradients.
            "virtual_group_size": virtual_group_size,
            "router_aux_loss_coef": router_aux_loss_coef,
            "output_router_logits": output_router_logits,
        }
        for key, value in settings.items():
            if text is self or getattr(text, key, None) is None:
                setattr(text, key, value)
        size, num_experts = text.virtual_group_size, text.num_experts
        if size < 1 or num_experts % size:
            raise ValueError(f"no groups of {size} in {num_experts} experts")
        if text.routing not in ROUTINGS:
            raise ValueError(f"unknown routing {text.routing!r}: one of {', '.join(ROUTINGS)}")


class UpcycledRouter(nn.Module):
    """Chooses K experts for each token, and weighs them."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__()
        self.top_k, self.routing = config.num_experts_per_tok, config.routing
        self.scaling_factor = config.routed_scaling_factor
        self.group_size = config.virtual_group_size
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if self.routing == "sigmoid-topk":
            bias_N = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias_N)
        self.records: list[tuple[torch.Tensor, ...]] | None = None

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (T, N), gates (T, K) and the experts' indices (T, K)."""
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        device = "cpu" if x_TH.device.type == "meta" else x_TH.device.type
        weight_NH = self.weight.to(dtype)
        if self.group_size > 1 and weight_NH.requires_grad:
            weight_NH = weight_NH.view_as(weight_NH)  # the hook is of this pass, not of the weight
            weight_NH.register_hook(self._mean_of_groups)  # type: ignore[no-untyped-call]
        with torch.autocast(device, enabled=False):
            logits_TN = nn.functional.linear(x_TH.to(dtype), weight_NH)
        if self.routing == "sigmoid-topk":
            scores_TN = logits_TN.sigmoid()
            wanted_TN = scores_TN + self.e_score_correction_bias
        else:
            scores_TN = wanted_TN = logits_TN.softmax(-1)
        # topk breaks ties at will. Experts that hold parts of one MLP are neighbours and always
        # tie, so that the lowest index first keeps them together when groups tie as well.
        chosen_TK = wanted_TN.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        gates_TK = scores_TN.gather(-1, chosen_TK)
        if self.routing != "softmax-topk":
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        if self.records is not None:
            self.records.append((logits_TN, scores_TN, chosen_TK))
        return logits_TN, gates_TK * self.scaling_factor, chosen_TK

    def _mean_of_groups(self, gradient_NH: torch.Tensor) -> torch.Tensor:
        groups = gradient_NH.reshape(-1, self.group_size, gradient_NH.shape[-1])
        return groups.mean(1, keepdim=True).expand_as(groups).reshape(gradient_NH.shape)


class UpcycledExperts(nn.Module):
    """The experts of a layer, as stacked weights; a gate's rows come before those of up."""

    act_fn: Any

    def __init__(self, config: UpcycledConfig, dense: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        # The activation is the layer's, whose name for its parameters, if it has any, stays.
        self.__dict__["act_fn"] = act_fn
        self.has_gate, self.has_bias, self.is_transposed = _form(dense)
        N, H, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.num_experts, self.hidden_dim, self.intermediate_dim = N, H, I
        self.first, rows = ("gate_up_proj", 2 * I) if self.has_gate else ("up_proj", I)
        shapes = ((rows, H), (H, I))
        if self.is_transposed:
            shapes = ((H, rows), (I, H))
        for name, shape in zip((self.first, "down_proj"), shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(N, *shape)))
        if self.has_bias:
            self.register_parameter(f"{self.first}_bias", nn.Parameter(torch.empty(N, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(N, H))

    def forward(
        self, x_TH: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of what each token's experts compute, (T, H)."""
        sum_TH = torch.zeros_like(x_TH, dtype=gates_TK.dtype)
        for expert in torch.unique(chosen_TK).tolist():
            token, place = torch.where(chosen_TK == expert)
            inner = self._linear(self.first, expert, x_TH[token])
            if self.has_gate:
                gate, up = inner.chunk(2, dim=-1)
                inner = self.act_fn(gate) * up
            else:
                inner = self.act_fn(inner)
            out = self._linear("down_proj", expert, inner) * gates_TK[token, place, None]
            sum_TH.index_add_(0, token, out.to(sum_TH.dtype))
        return sum_TH.to(x_TH.dtype)

    def _linear(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        weight = getattr(self, name)[expert]
        return nn.functional.linear(x, weight.T if self.is_transposed else weight, bias)


if with_implementations is not None:
    with_implementations(UpcycledExperts)


def _form(dense: nn.Module) -> tuple[bool, bool, bool]:
    """Return whether a dense MLP is gated, has biases, and has its matrices transposed."""
    # Under DeepSpeed's ZeRO-3 a parameter is empty, and only ds_shape tells its shape.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in dense.named_parameters()}
    sizes = [math.prod(shape) for shape in shapes.values() if len(shape) == 2]
    is_gated = sum(sizes) == 3 * min(sizes)  # gate and up may be one matrix
    is_transposed = any(type(child).__name__ == "Conv1D" for child in dense.children())
    return is_gated, any(name.endswith("bias") for name in shapes), is_transposed


class UpcycledMoe(nn.Module):
    """A router and its experts, in the place of a dense MLP."""

    def __init__(self, config: UpcycledConfig, dense: nn.Module) -> None:
        super().__init__()
        self.gate = UpcycledRouter(config)
        others = (m for m in dense.children() if not hasattr(m, "weight"))
        # Taken from the dense MLP, since it may have parameters (xIELU); some call a function.
        self.act_fn = next((m for m in others if not isinstance(m, nn.Dropout)), nn.SiLU())
        experts = UpcycledExperts(config, dense, self.act_fn)
        # transformers has written what its decorator was told over these.
        experts.has_gate, experts.has_bias, experts.is_transposed = _form(dense)
        is_silu = type(self.act_fn).__name__ in {"SiLU", "SiLUActivation"}
        # vLLM puts its own gated SiLU experts, without biases, for any child named "experts".
        is_usual = experts.has_gate and is_silu and not experts.has_bias
        self.experts_name = "experts" if is_usual else "expert_mlps"
        self.add_module(self.experts_name, experts)
        dropout = next((m for m in dense.children() if isinstance(m, nn.Dropout)), None)
        adds_residual = "residual" in signature(dense.forward).parameters
        rate = getattr(dense, "hidden_dropout" if adds_residual else "residual_dropout", 0.0)
        self.dropout = dropout or nn.Dropout(rate)

    def forward(self, hidden_states: torch.Tensor, residual: Any = None) -> torch.Tensor:
        """Return what the chosen experts make of each token, plus the residual if it is given."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates_TK, chosen_TK = self.gate(x_TH)
        out_TH: torch.Tensor = getattr(self, self.experts_name)(x_TH, chosen_TK, gates_TK)
        made: torch.Tensor = self.dropout(out_TH.view_as(hidden_states))
        return made if residual is None else made + residual


class _Upcycled:
    """What the base model and the causal LM share."""

    config: Any
    config_class = UpcycledConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers would look into the source, and cache its answer on the dense class.
        return with_implementations is not None

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, UpcycledRouter | UpcycledExperts):
            super()._init_weights(module)  # type: ignore[misc]
            return
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            std = 0.0 if name.endswith("bias") else getattr(self.config, "initializer_range", 0.02)
            nn.init.normal_(tensor, std=std)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,  # noqa: FBT001, FBT002 - as transformers calls it
        gradient_checkpointing_func: Any = checkpoint,
        **kwargs: Any,
    ) -> None:
        # A reentrant checkpoint runs without a graph: the routers' loss would have no gradient.
        without_reentry = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, without_reentry, **kwargs)  # type: ignore[misc]


def _mlp_of(layer: Any) -> tuple[str, nn.Module]:
    """Return the name and the module of a layer's MLP."""
    if hasattr(layer, "fc1"):
        # The layer itself runs the MLP: fc1 becomes the experts, and the rest does nothing.
        dense = nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2)
        layer.activation_fn = layer.fc2 = nn.Identity()
        layer.activation_dropout = 0.0  # it is for neurons, not for the output of experts
        return "fc1", dense
    children = layer.named_children()
    [(name, dense)] = [p for p in children if type(p[1]).__name__.lower().endswith("mlp")]
    return name, dense


def _turn_into_experts(model: Any) -> None:
    config, text = model.config.get_text_config(), getattr(model, "language_model", model)
    text = getattr(text, "decoder", text)
    layers = next(child for child in text.children() if isinstance(child, nn.ModuleList))
    for index in config.moe_layers:
        name, dense = _mlp_of(layers[index])
        setattr(layers[index], name, UpcycledMoe(config, dense))


@contextmanager
def _noting_routers(model: nn.Module, *, is_noted: bool = True) -> Iterator[list[Any]]:
    """Give a list to which each router adds its logits, scores and choices as it runs."""
    routers = [m for m in model.modules() if isinstance(m, UpcycledRouter) and is_noted]
    records: list[tuple[torch.Tensor, ...]] = []
    try:
        for router in routers:
            router.records = records
        yield records
    finally:
        # What a checkpoint runs again in the backward pass is not noted a second time.
        for router in routers:
            router.records = None


def _logits(records: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(logits_TN for logits_TN, _, _ in records)


class UpcycledModel(_Upcycled, DenseModel):  # type: ignore[misc]
    """The dense family's base model, with experts in the layers that config.moe_layers names."""

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__(config)
        _turn_into_experts(self)
        self.post_init()

    @wraps(DenseModel.forward)
    def forward(self, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        """Run the dense family's forward; some trainers ask for the routers' logits here."""
        if not output_router_logits:
            return super().forward(*args, **kwargs)
        with _noting_routers(self) as records:
            output = super().forward(*args, **{**kwargs, "return_dict": True})
        output["router_logits"] = _logits(records)
        return output


class UpcycledForCausalLM(_Upcycled, DenseForCausalLM):  # type: ignore[misc]
    """The dense family's causal LM on an UpcycledModel; in training its routers are balanced."""

    def __init__(self, config: UpcycledConfig) -> None:
        if with_implementations is None:
            super().__init__(config)
        else:
            # The dense base model, built first, would refuse every other one.
            requested, config._experts_implementation = config._experts_implementation, "eager"
            super().__init__(config)
            config._experts_implementation = self.get_correct_experts_implementation(requested)
        # It becomes the upcycled one, layer by layer, where a second would take its memory again.
        # Models with a text model inside say "model" in newer releases alone.
        inner = getattr(self, self.base_model_prefix or "model")
        inner.__class__ = UpcycledModel
        _turn_into_experts(inner)
        self.post_init()

    @wraps(DenseForCausalLM.forward)
    def forward(
        self,
        *args: Any,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the dense family's forward, and balance the routers on the way."""
        # Which of them comes second differs between text models and others.
        names = [*signature(DenseForCausalLM.forward).parameters][1:]
        kwargs |= dict(zip(names, args, strict=False))
        config = self.config.get_text_config()
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        is_noted = bool(self.training or output_router_logits)
        with _noting_routers(self, is_noted=is_noted) as records:
            output = super().forward(return_dict=True, **kwargs)
        if records:
            loss = _balancing_loss(records, kwargs.get("attention_mask"))
            output["aux_loss"] = loss.to(output.logits.device)
            if output.loss is not None:
                weight = config.router_aux_loss_coef
                labels, num_items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
                if labels is not None and num_items is not None:
                    # A part of an optimizer's step: the losses of all parts are added up.
                    weight = weight * labels[..., 1:].ne(-100).sum() / num_items
                output["loss"] = output.loss + weight * output["aux_loss"]
            if output_router_logits:
                output["router_logits"] = _logits(records)
            if output.keys() <= MoeCausalLMOutputWithPast.__dataclass_fields__.keys():
                output = MoeCausalLMOutputWithPast(**output)
        is_dict = self.config.return_dict if return_dict is None else return_dict
        return output if is_dict else output.to_tuple()


def _balancing_loss(records: list[tuple[torch.Tensor, ...]], mask: Any) -> torch.Tensor:
    """Return the mean over layers of N · Σ (share of tokens · mean probability) over experts.

    Per layer, since opposite imbalances of two layers must not cancel; tokens that the mask leaves
    out do not count. Balanced routers have the loss K, as in transformers' own models.
    """
    losses = []
    for _, scores_TN, chosen_TK in records:
        kept_T1 = torch.ones_like(scores_TN[:, :1])
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            positions = len(kept_T1) // len(mask)  # fewer than the mask has, beside a cache
            kept_T1 = mask[:, -positions:].reshape(-1, 1).bool().to(kept_T1)
        part_T1 = kept_T1 / kept_T1.sum()
        picked_TN = torch.zeros_like(scores_TN).scatter_(1, chosen_TK, 1.0)
        probabilities_TN = scores_TN / scores_TN.sum(-1, keepdim=True)
        product_N = (part_T1 * picked_TN).sum(0) * (part_T1 * probabilities_TN).sum(0)
        losses.append(len(product_N) * product_N.sum().to(records[0][0].device))
    return torch.stack(losses).mean()

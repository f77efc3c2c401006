"""Learned optimizers: a module with meta-parameters that, bound to a network, is an ordinary `torch.optim.Optimizer`.

For every scalar of the network it reads the weight, the gradient and five momenta, and returns a direction d and a
magnitude m; the scalar changes by -β d exp(α m) (Metz et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.models.optimizers.context import FEATURES, LayerLSTM, NFNContext, NGGNNContext, NGTContext, NoContext
from ngcore.models.optimizers.layout import Layout

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)  # of the momenta
P = 10.0  # smallest logarithm that is distinguished (Andrychowicz et al., 2016)
ALPHA = BETA = 1e-3
HIDDEN = 32
INITIAL_SCALE = 0.1

# What a scalar is told of the others, by the method's name.
METHODS: dict[str, type[nn.Module]] = {
    "FF": NoContext,
    "LSTM": LayerLSTM,
    "NFN": NFNContext,
    "NG-GNN": NGGNNContext,
    "NG-T": NGTContext,
}


def log_and_sign(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape 2"]:
    """A number as its logarithm and sign (Andrychowicz et al., 2016, appendix A).

    (log|x| / p, sgn x) where |x| ≥ exp(-p), else (-1, exp(p) x); both within [-1, 1] for |x| ≤ exp(p).
    """
    smallest = torch.tensor(-P, dtype=x.dtype, device=x.device).exp()
    return torch.stack([x.abs().clamp(min=smallest).log() / P, (x / smallest).clamp(-1, 1)], dim=-1)


def scalar_features(
    weights: Float[Tensor, "*batch scalars"],
    gradients: Float[Tensor, "*batch scalars"],
    momenta: Float[Tensor, "*batch 5 scalars"],
) -> Float[Tensor, "*batch scalars 14"]:
    """What a learned optimizer reads of every scalar: weight, gradient and momenta, as logarithms and signs."""
    numbers = torch.cat([weights.unsqueeze(-2), gradients.unsqueeze(-2), momenta], dim=-2)
    return log_and_sign(numbers.transpose(-1, -2)).flatten(-2)


class LearnedOptimizer(nn.Module):
    """The rule by which parameters change: a context, and a network applied to every scalar and its context.

    Args:
        method: a key of METHODS.
        options: arguments of the context.

    Raises:
        ValueError: an unknown method.
    """

    def __init__(self, method: str, **options: Any) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
        self.method, self.options = method, options
        self.context = METHODS[method](**options)
        self.network = nn.Sequential(
            nn.Linear(FEATURES + self.context.width, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, 2),
        )
        with torch.no_grad():  # at first changes are small: random ones would ruin a network within an unroll
            self.network[-1].weight *= INITIAL_SCALE
            self.network[-1].bias.zero_()

    def fit_normalization(self, layout: Layout) -> None:
        """Take what the context normalizes by from the network that is trained on."""
        if hasattr(self.context, "fit_normalization"):
            self.context.fit_normalization(layout)

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars"]:
        """What to add to every scalar, -β d exp(α m), for a batch of networks of one layout."""
        state = torch.cat([features, self.context(features, layout)], dim=-1)
        direction, magnitude = self.network(state).unbind(-1)
        return -BETA * direction * torch.exp(ALPHA * magnitude)

    def bind(self, network: nn.Module, *example_inputs: Any) -> BoundOptimizer:
        """An optimizer of this network's parameters.

        Args:
            example_inputs: what the network is called with; FF and LSTM do not need them, the others read its graph.

        Raises:
            TraceError: the network has operators that the graph cannot hold; the message names them.
            ValueError: it has kernels larger than 3x3, or layers that the method was not built for.
        """
        layout = Layout.of(network, *(example_inputs if self.context.reads_graph else ()))
        return BoundOptimizer(self, dict(network.named_parameters()), layout)


class BoundOptimizer(torch.optim.Optimizer):
    """A learned optimizer and a network's parameters; with `step`, `zero_grad` and `state_dict` like any other.

    The state of a parameter are its momenta, (5, *shape).
    """

    def __init__(self, rule: LearnedOptimizer, parameters: Mapping[str, nn.Parameter], layout: Layout) -> None:
        super().__init__(parameters.values(), {})
        self.rule, self.names, self.layout = rule, list(parameters), layout
        weight = next(rule.parameters())
        if weight.device != layout.device:
            raise ValueError(
                f"the optimizer is on {weight.device}, the network on {layout.device}: move the one to the "
                "other first, rule.to(device)"
            )
        with torch.no_grad():  # whether the method can read these layers is found now
            rule(weight.new_zeros(1, layout.count, FEATURES), layout)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch's own leaves out what subclasses add."""
        return super().__getstate__() | {"rule": self.rule, "names": self.names, "layout": self.layout}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the momenta back that `state_dict` gave.

        Raises:
            ValueError: they are of another optimizer, or of another network; the error names the parameter.
        """
        for i, own in state_dict["state"].items():
            expected = (len(DECAYS), *self.parameters[i].shape) if i < len(self.names) else None
            if set(own) != {"momenta"} or tuple(own["momenta"].shape) != expected:
                found = ", ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in own.items())
                name = self.names[i] if expected else f"number {i}"
                raise ValueError(f"the state of parameter {name} must be its momenta {expected}, not {found}")
        super().load_state_dict(state_dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.param_groups[0]["params"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the network's own parameters, once.

        Raises:
            ValueError: any others.
        """
        if self.param_groups:
            raise ValueError("a learned optimizer is bound to one network: bind another one to further parameters")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Change the parameters by what the rule makes of their gradients.

        Raises:
            ValueError: a parameter has no gradient.
            FloatingPointError: a gradient is not finite; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _, features = self.observe()
        self.move(self.rule(features.unsqueeze(0), self.layout).squeeze(0))
        return loss

    @torch.no_grad()
    def observe(self) -> tuple[Float[Tensor, " scalars"], Float[Tensor, "scalars 14"]]:
        """Take the gradients into the momenta; the gradients, and what the rule reads. Raises what `step` does."""
        gradients = self._gradients()
        weights = self.layout.flatten(self.parameters)
        if not self.state:
            for p in self.parameters:
                self.state[p]["momenta"] = torch.zeros(len(DECAYS), *p.shape, dtype=p.dtype, device=p.device)
        own = [self.state[p]["momenta"] for p in self.parameters]
        momenta = self.layout.flatten(own)
        momenta.lerp_(gradients, 1 - gradients.new_tensor(DECAYS).unsqueeze(1))
        torch._foreach_copy_(own, self.layout.split(momenta))
        return gradients, scalar_features(weights, gradients, momenta).to(next(self.rule.parameters()).dtype)

    def _gradients(self) -> Float[Tensor, " scalars"]:
        """Of all parameters, in the order of the layout."""
        missing = [n for n, p in zip(self.names, self.parameters, strict=True) if p.grad is None]
        if missing:
            raise ValueError(
                f"no gradient of {', '.join(missing)}: call loss.backward() before step(). A learned optimizer changes "
                "every parameter of its network: none may be frozen or unused"
            )
        found = self.layout.flatten(p.grad for p in self.parameters)
        if not torch.isfinite(found).all():
            bad = [n for n, p in zip(self.names, self.parameters, strict=True) if not torch.isfinite(p.grad).all()]
            raise FloatingPointError(f"the gradient of {', '.join(bad)} is not finite; nothing was changed")
        return found

    @torch.no_grad()
    def move(self, change: Float[Tensor, " scalars"]) -> None:
        """Add to the parameters."""
        torch._foreach_add_(self.parameters, self.layout.split(change.to(self.parameters[0].dtype)))

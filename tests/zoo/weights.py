"""Random models in torch: every parameter random, none at a value that hides an error."""

from __future__ import annotations

from typing import Any

from zoo.families import Family

__all__ = ["build"]

_SEED = 7
# Norm weights around 1 (or 0 where the architecture adds the 1), biases around 0: a rule that drops one is seen.
_VECTOR_SPREAD = 0.2


def build(family: Family) -> Any:
    """The torch model of `family` in float32 and eval mode, the same in every process.

    Matrices are normal with variance 1 / inputs, so attention and logits have a spread of about 1: greedy choices are
    far from ties and no softmax is saturated.
    """
    import torch
    import transformers

    cls = getattr(transformers, family.model)
    torch.manual_seed(_SEED)
    model = (
        cls._from_config(cls.config_class(**family.config), attn_implementation="sdpa")
        if getattr(cls, "_supports_sdpa", False)
        else cls(cls.config_class(**family.config))
    )
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(_VECTOR_SPREAD * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()

"""Networks that predict something other than the noise, as the samplers want them."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor

from pdiff_lib.generators.diffusion import Denoiser, Schedule


def from_x0(predict: Callable[[Tensor, Tensor], Tensor], schedule: Schedule) -> Denoiser:
    """The noise that follows from a predicted clean x0, for `diffusion.ddpm` and `diffusion.ddim`.

    Args:
        predict: (x_t [B L], t [B]) -> x0 [B L].
        schedule: that x_t was made with.

    Source: Eq. 2, solved for eps.
    """

    def denoise(x: Float[Tensor, "B L"], t: Int64[Tensor, "B"]) -> Float[Tensor, "B L"]:
        bar = schedule.alpha_bar_on(x.device)[t].unsqueeze(1)
        signal, noise = bar.sqrt().to(x.dtype), (1 - bar).sqrt().to(x.dtype)
        return (x - signal * predict(x, t)) / noise

    return denoise

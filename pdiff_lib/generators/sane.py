"""SANE and hyper-representations: autoencoders with attention over the rows of a network, sampled by densities of their latents.

`SANE` has a latent for each token, `HyperRep` one for the network. Networks come in as they are: bringing hidden units to one
order is a step before, `Coded(SANE(...), Canonical(net))`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pdiff_lib.base import training, vectors
from pdiff_lib.base.recipe import setting
from pdiff_lib.base.runs import Store, tensor_digest
from pdiff_lib.generators import kde, learned, tokens

ROW = 289  # the longest token by default: a row of 32 channels, 3 x 3, and a bias
PROJECTED = 30  # numbers that the contrastive loss compares


@dataclasses.dataclass(frozen=True)
class Settings(learned.Training, kde.Sampling):
    """`token_length`: 0 for the longest row, at most 289. `latent`: numbers per token (SANE) or network (HyperRep). `width`,
    `heads`, `layers`: of the encoder, and of the decoder. `contrast`: weight of the contrastive loss, the rest is that of the
    squared error; `temperature`: of it. `view_noise`: both views are multiplied with N(1, view_noise^2)."""

    steps: int = setting(2000, 1)
    batch: int = setting(64, 2)
    token_length: int = setting(0, 0)
    width: int = setting(64, 2)
    heads: int = setting(4, 1)
    layers: int = setting(2, 1)
    latent: int = setting(32, 1)
    contrast: float = setting(0.05, 0.0, 1.0)
    temperature: float = setting(0.1, 1e-9)
    view_noise: float = setting(0.1, 0.0)


@dataclasses.dataclass(frozen=True)
class Windowed(Settings):
    """`window`: tokens that see each other."""

    window: int = setting(64, 1)


@dataclasses.dataclass(frozen=True)
class Whole(Settings):
    """The bandwidth of 2022."""

    latent: int = setting(128, 1)
    bandwidth: float = setting(0.002, 0.0)


def nt_xent(a: Float[Tensor, "B P"], b: Float[Tensor, "B P"], temperature: float) -> Float[Tensor, ""]:
    """Contrastive loss of two views, each row's partner the same row of the other: cross entropy of finding it among all others
    by the cosine of the angle (Chen et al. 2020, Eq. 1)."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(a)))


def masked_mse(y: Float[Tensor, "B N T"], x: Float[Tensor, "B N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, ""]:
    """Squared error, averaged over what is no padding."""
    return (y - x).where(mask, 0.0).square().sum() / (len(x) * mask.sum())


def permuted(v: Float[Tensor, "B D"], groups: Sequence[Int64[Tensor, "_ _"]], g: torch.Generator) -> Float[Tensor, "B D"]:
    """Each network with its hidden units in an order of its own, drawn on the vectors' device: the same functions."""
    for group in groups:
        order = torch.rand(len(v), len(group), generator=g, device=v.device).argsort(dim=1)
        v = v.scatter(1, group.flatten().expand(len(v), -1), v.gather(1, group[order].flatten(1)))
    return v


class AttentionAutoencoder(nn.Module):
    """Transformers on both sides of a latent; both know where each token stands.

    Args:
        sequence: the tokens of a vector.
        s: its sizes.
        window: how many of them are seen at once.
        whole: one latent of the window instead of one per token.
    """

    def __init__(self, sequence: tokens.Tokens, s: Settings, window: int, whole: bool):
        super().__init__()
        places = torch.stack([torch.arange(len(sequence)), sequence.tensor, sequence.within])
        self.register_buffer("places", places, persistent=False)
        self.whole, together = whole, window if whole else 1
        length = sequence.positions.shape[1]
        self.positions = nn.ModuleList(nn.Embedding(int(p.max()) + 1, s.width // 2) for p in places)
        for table in self.positions:
            nn.init.normal_(table.weight, std=0.02)
        self.enter, self.leave = nn.Linear(length, s.width), nn.Linear(s.width, length)
        self.encoder, self.decoder = (nn.TransformerEncoder(nn.TransformerEncoderLayer(
            s.width, s.heads, 4 * s.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True), s.layers,
            nn.LayerNorm(s.width), enable_nested_tensor=False) for _ in range(2))
        self.to_latent, self.from_latent = nn.Linear(together * s.width, s.latent), nn.Linear(s.latent, together * s.width)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(window // together * s.latent, PROJECTED, bias=False), nn.LayerNorm(PROJECTED),
                                  nn.ReLU(), nn.Linear(PROJECTED, PROJECTED, bias=False), nn.LayerNorm(PROJECTED), nn.ReLU())

    def _at(self, at: Int64[Tensor, "n"]) -> Float[Tensor, "n W"]:
        sequence, layer, within = (table(place[at]) for table, place in zip(self.positions, self.places))
        return torch.cat([sequence + layer, within], dim=1)

    def encode(self, x: Float[Tensor, "B n T"], at: Int64[Tensor, "n"]) -> Float[Tensor, "B ..."]:
        """Latents of the tokens that stand at `at` in their sequence: [B n L], or [B L] of them all."""
        h = self.encoder(self.enter(x) + self._at(at))
        return self.to_latent(h.flatten(1) if self.whole else h)

    def decode(self, z: Float[Tensor, "B ..."], at: Int64[Tensor, "n"]) -> Float[Tensor, "B n T"]:
        """Tokens of latents; what stands on padding means nothing."""
        h = self.from_latent(z)
        return self.leave(self.decoder((h.unflatten(1, (len(at), -1)) if self.whole else h) + self._at(at)))


class _Hyper(learned.Learned):
    """What both have in common; derived classes say how much of a network is seen at once, and which shape latents have."""

    SAMPLING = tuple(f.name for f in dataclasses.fields(kde.Sampling))  # one training serves every way of sampling
    CODE: ClassVar[tuple[Any, ...]] = (tokens, vectors.Standardiser)
    whole: ClassVar[bool]

    def __init__(self, shapes: Sequence[tuple[int, ...]], groups: Sequence[Int64[Tensor, "_ _"]] | None = None,
                 judge: kde.Judge | None = None, device: str | torch.device | None = None, progress: bool = True, **settings):
        shapes = tuple(tuple(shape) for shape in shapes)
        super().__init__([prod(shape) for shape in shapes], device, progress, **settings)
        self.shapes, self.judge, s = shapes, judge, self.settings
        self.groups = tuple(group.to(self.device) for group in groups or ())
        for i, group in enumerate(self.groups):
            if group.ndim != 2 or group.is_floating_point() or not 0 <= group.amin() <= group.amax() < sum(self.sizes):
                raise ValueError(f"group {i} of hidden units is {group.dtype} {list(group.shape)}: expected [units numbers], places from "
                                 f"0 to {sum(self.sizes) - 1}")
        if s.width % (2 * s.heads):
            raise ValueError(f"width is {s.width} with {s.heads} heads: expected a multiple of {2 * s.heads}")
        if s.sampling != "KDE30" and judge is None:
            raise ValueError(f"sampling is {s.sampling!r} and judge is None: expected a judge to choose by")
        longest = int(tokens.Tokens.rows(shapes, ROW).mask.sum(dim=1).max())
        self.tokens = tokens.Tokens.rows(shapes, s.token_length or longest)
        self.mask = self.tokens.mask.to(self.device)
        self.window = len(self.tokens) if self.whole else min(len(self.tokens), s.window)

    def fit(self, theta: Float[vectors.Array, "K D"], store: Store | None = None, condition: Tensor | None = None) -> _Hyper:
        """Train the autoencoder, and remember the latents of the best originals. Arguments and errors as of `Learned.fit`; the
        judge's verdict on the originals is asked for before the training."""
        super().fit(theta, store, condition)
        self.z = self._encode(self.v[self.kept])
        del self.v
        return self

    def _prepare(self, theta: Float[Tensor, "K D"]) -> None:
        layers = torch.bincount(self.tokens.tensor, self.tokens.mask.sum(dim=1)).long().tolist()  # a bias belongs to its weights
        self.standardise = vectors.Standardiser(theta, layers)
        self.v, self.kept = self.standardise(theta), torch.arange(len(theta), device=self.device)
        self.score = None
        if self.judge is not None:
            self.score = torch.cat([kde.scores(self.judge, part) for part in theta.split(kde.CHUNK)])
            self.kept = kde.best(self.score, self.settings.share)

    def _build(self) -> AttentionAutoencoder:
        return AttentionAutoencoder(self.tokens, self.settings, self.window, self.whole)

    def _loss(self, net: nn.Module, step: int, g: torch.Generator) -> Float[Tensor, ""]:
        s, device = self.settings, self.device
        v = self.v[torch.randperm(len(self.v), generator=g, device=device)[:s.batch]]
        x = self.tokens.encode(torch.cat([permuted(v, self.groups, g), v]))
        x = x * (1 + s.view_noise * torch.randn(x.shape, generator=g, device=device))
        at = torch.randint(len(self.tokens) - self.window + 1, (1,), generator=g, device=device) + torch.arange(self.window, device=device)
        x = x[:, at]
        z = net.encode(x, at)
        error = masked_mse(net.decode(z, at), x, self.mask[at])
        return s.contrast * nt_xent(*net.head(z).chunk(2), s.temperature) + (1 - s.contrast) * error

    def _windows(self) -> Iterator[tuple[Int64[Tensor, "n"], int]]:
        """Each as long as in training: the last one begins before the one before ends, and how many tokens were seen by then."""
        for start in range(0, len(self.tokens), self.window):
            first = min(start, len(self.tokens) - self.window)
            yield torch.arange(first, first + self.window, device=self.device), start - first

    @torch.no_grad()
    def _encode(self, v: Float[Tensor, "M D"]) -> Float[Tensor, "M numbers"]:
        with training.precision(self.device):
            return torch.cat([torch.cat([self.net.encode(x[:, at], at)[:, seen:].flatten(1) for at, seen in self._windows()], dim=1)
                              for x in map(self.tokens.encode, v.split(kde.CHUNK))])

    @torch.no_grad()
    def _decode(self, z: Float[Tensor, "M numbers"]) -> Float[Tensor, "M D"]:
        self._fitted()
        shape = (self.settings.latent,) if self.whole else (len(self.tokens), self.settings.latent)
        z = vectors.vectors(z, prod(shape), device=self.device).unflatten(1, shape)
        with training.precision(self.device):
            return torch.cat([self.standardise.inverse(self.tokens.decode(torch.cat([
                self.net.decode(part if self.whole else part[:, at], at)[:, seen:] for at, seen in self._windows()], dim=1)))
                for part in z.split(kde.CHUNK)])

    def encode(self, theta: Float[vectors.Array, "M D"]) -> Float[Tensor, "M ..."]:
        """Latents of raw vectors.

        Raises:
            ValueError: before `fit`, or what `vectors.vectors` refuses.
        """
        self._fitted()
        return self._encode(self.standardise(vectors.vectors(theta, self.numel, device=self.device)))

    def _draw(self, n: int, generator: torch.Generator | None, condition: Tensor | None) -> Float[Tensor, "n D"]:
        return kde.sample(self.z, n, self.settings, self._decode, self.judge, generator)

    def _key(self, theta: Float[Tensor, "K D"]) -> dict[str, Any]:
        return {**super()._key(theta), "shapes": self.shapes, "groups": [tensor_digest(group) for group in self.groups]}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """As of `Learned`; of the judge, what it said of the originals."""
        return {**super().fingerprint, "z": tensor_digest(self.z), "score": self.score is not None and tensor_digest(self.score),
                "standardise": tensor_digest({"mean": self.standardise.mean, "std": self.standardise.std})}


class SANE(_Hyper):
    """Sequential autoencoder of neural embeddings: a latent for each token of a network.

    A row of a layer and its bias are a token, cut and padded to `token_length`, each layer standardised by itself. Each training step
    sees two views of each network, one with its hidden units in a random order and one as it is, in a window of the sequence.

    Args:
        shapes: of the tensors in a vector.
        groups: which numbers belong to which hidden unit, [units numbers] per layer (`symmetry.groups`); None: no view is permuted.
        judge: raw vectors [m D], where the generator computes, to scores [m], larger is better, on validation items. It chooses the
            best 30 % of the originals, and what "SUB" and "BOOT" keep; None: the densities are those of **all** originals.
        device, progress: as of `Learned`.
        settings: of `Windowed`, by name.

    Attributes:
        z: [kept, N * latent] latents that densities are fitted to; kept: which originals these are, the best first.

    Raises:
        ValueError: an unknown setting or a value out of range, groups that are no places in the vector, "SUB" or "BOOT" without a
            judge.

    Source: Schuerholt et al. 2024 and its released code: both views are reconstructed, from and to their noisy tokens; positions
        in the sequence and of the layer are added, that in the layer is appended. `SIZES`: "ResNet-18" is the code's; of "CNN" the
        width and the depth are not verified, and are ours. Deviations: a pre-norm transformer of PyTorch's; the squared error is
        averaged over numbers that are there, theirs over the padding as well; a cosine schedule in place of OneCycle; long sequences
        are encoded window after window, without the margin around each ("halo") that theirs may have; running statistics of batch
        norms are the caller's.
    """

    Settings = Windowed
    whole = False
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "ResNet-18": {"token_length": 288, "latent": 128, "width": 2048, "heads": 16, "layers": 8, "window": 256, "batch": 32, "lr": 1e-4,
                      "weight_decay": 3e-9, "contrast": 0.05, "temperature": 0.1, "view_noise": 0.1},
        "CNN": {"token_length": 289, "latent": 128, "window": 64}}

    def encode(self, theta: Float[vectors.Array, "M D"]) -> Float[Tensor, "M N L"]:
        """Latents of raw vectors, one per token. Errors as of `fit`, and before it."""
        return super().encode(theta).unflatten(1, (len(self.tokens), -1))

    def decode(self, z: Float[Tensor, "M N L"]) -> Float[Tensor, "M D"]:
        """Raw vectors of latents. Raises ValueError before `fit`, and for another number of them."""
        return self._decode(z.flatten(1))


class HyperRep(_Hyper):
    """Hyper-representations: one latent of `latent` numbers (128 by default) for a whole small network; S_KDE30 with its defaults.

    Arguments, attributes and errors as of `SANE`, settings of `Whole`; z: [kept, latent].

    Source: Schuerholt et al. 2022 and its released code (bandwidth .002; tokens of a network, one linear layer to the latent and one
        back). Sizes of the latent and of the transformer, and the weight of the contrastive loss, are not verified, and are ours.
        Deviations: all rows are padded to one length for one linear layer, theirs has one per layer; each layer is standardised, where
        theirs divides the loss by the layer's variance.
    """

    Settings = Whole
    whole = True

    def encode(self, theta: Float[vectors.Array, "M D"]) -> Float[Tensor, "M L"]:
        """Latents of raw vectors, one each. Errors as of `fit`, and before it."""
        return super().encode(theta)

    def decode(self, z: Float[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """Raw vectors of latents. Raises ValueError before `fit`, and for latents of another length."""
        return self._decode(z)

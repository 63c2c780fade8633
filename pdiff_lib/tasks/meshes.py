"""Bodies as objects: meshes from files, brought into the cube, and where they are solid, by winding number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from tqdm.auto import tqdm

from pdiff_lib.base import inputs, recipe, training
from pdiff_lib.base.extras import extra
from pdiff_lib.base.runs import Store
from pdiff_lib.networks import surfaces

SIGMA = 0.01  # of points near the surface, in units of the cube's half side
INSIDE = 0.5  # winding number from which on a point is inside
FILL = 0.95  # of the cube, along a body's longest side
SUFFIXES = (".ply", ".obj", ".stl", ".off", ".glb", ".gltf", ".3mf", ".dae")


def load(settings: recipe.Data, store: Store | None = None) -> tuple[Any, ...]:
    """Bodies of a folder: one class per subfolder, or all of one class.

    Each is moved and scaled as it stands (no axis is turned): the middle of its bounding box to 0, its longest side to `FILL` of the
    cube. Points of training are uniform in the cube, then as many near the surface: uniform on it, moved by a normal error of
    `SIGMA`. A point is inside where the generalised winding number is at least 1/2: also of meshes with holes and open parts.

    Args:
        settings: `dataset`, the folder; `test_images`, how many bodies are for testing (0: a fifth of all), and `train_images`, how many
            others there are (0: the rest); `field_points`, `field_test_points`, `data_seed`.
        store: keeps points and values of each file (stage "shape"); None keeps nothing.

    Returns:
        What `objects.Objects` holds, without its name.

    Raises:
        ValueError: trimesh or libigl is missing; no folder, or none with meshes; a file that cannot be read, without faces, with numbers that are
            not finite, or flat; a body without a point inside; fewer than are asked for.

    Source: Erkoc et al. 2023 (HyperDiffusion): points, sigma, inside by winding number.
    """
    if settings.image_channels:
        raise ValueError(f"image_channels = {settings.image_channels} with field_kind 'mesh': expected 0")
    folder = Path(settings.dataset)
    if not folder.is_dir():
        raise ValueError(f"dataset {settings.dataset!r} is no folder: expected one of meshes ({', '.join(SUFFIXES)}), or of a folder for each "
                         "class of them, with field_kind 'mesh'")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not any(q.startswith(".") for q in p.relative_to(folder).parts))
    tests = settings.test_images or max(1, len(found) // 5)
    fitted = settings.train_images or len(found) - tests
    if len(found) < max(1, fitted) + tests:
        raise ValueError(f"folder {folder.name!r} holds {len(found)} meshes ({', '.join(SUFFIXES)}): expected at least "
                         f"{max(1, fitted) + tests}, {max(1, fitted)} for training and {tests} for testing")
    # RandomState, whose numbers NumPy promises never to change.
    order = np.random.RandomState(settings.data_seed).permutation(len(found))[:fitted + tests]
    files = [found[i] for i in order]
    kinds = [p.relative_to(folder).parts[0] if p.parent != folder else folder.name for p in files]
    classes = tuple(sorted(set(kinds)))
    test = _uniform(settings.field_test_points, settings.data_seed, "test")
    store = store or Store(None)
    bar = tqdm(files, desc="bodies", unit="mesh", disable=len(files) < 10, leave=False)
    parts = [_body(file, str(file.relative_to(folder)), settings, test, store) for file in bar]
    points, values, test_values = (torch.stack([part[name] for part in parts]) for name in ("points", "inside", "test"))
    return (tuple(str(f.relative_to(folder)) for f in files), torch.tensor([classes.index(k) for k in kinds]), classes, points, values, test,
            test_values, fitted, lambda rows, where: torch.stack([look(files[i], str(files[i].relative_to(folder)), where) for i in rows]))


def _uniform(n: int, seed: int, *purpose: str) -> Float[Tensor, "n 3"]:
    return 2 * torch.rand(n, 3, generator=torch.Generator().manual_seed(training.seed_for(seed, "shape", *purpose))) - 1


def _body(file: Path, name: str, settings: recipe.Data, test: Float[Tensor, "N 3"], store: Store) -> dict[str, Tensor]:
    content = inputs.digest(file.resolve())
    key = {"file": content, "points": settings.field_points, "test": len(test), "seed": settings.data_seed}

    def compute(_checkpoint) -> dict[str, Tensor]:
        vertices, faces = normalised(*read(file, name))
        generator = torch.Generator().manual_seed(training.seed_for(settings.data_seed, "shape", str(content)))
        points = torch.cat([2 * torch.rand(settings.field_points, 3, generator=generator) - 1,
                            near(vertices, faces, settings.field_points, generator)])
        inside = winding(vertices, faces, torch.cat([points, test])) >= INSIDE
        return {"points": points, "inside": inside[:len(points)], "test": inside[len(points):]}

    part = store.stage("shape", key, compute, code=(read, normalised, near, surfaces.points_on, winding, _uniform))
    if not part["test"].any():
        raise ValueError(f"mesh {name} is empty: none of {len(test)} points in the cube is inside (winding number of at least {INSIDE:g}); "
                         "expected a body whose faces look outward, or more points")
    return part


def look(file: Path, name: str, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
    """How often a body's surface goes around any points of the cube that it is brought into."""
    return winding(*normalised(*read(file, name)), points).float()


def read(file: Path, name: str) -> tuple[Float[Tensor, "V 3"], Int64[Tensor, "F 3"]]:
    """Vertices and triangles of a file; a scene's parts together.

    Raises:
        ValueError: trimesh is missing, or no mesh in the file; names it.
    """
    package = surfaces.trimesh()
    try:
        mesh = package.load(file, force="mesh", process=False)
        vertices, faces = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32), torch.tensor(np.asarray(mesh.faces), dtype=torch.int64)
    except Exception as error:  # each format fails in ways of its own
        raise ValueError(f"mesh {name} cannot be read ({type(error).__name__}: {error}): expected a mesh in one of {', '.join(SUFFIXES)}") from error
    if not faces.numel() or not vertices.numel():
        raise ValueError(f"mesh {name} is empty: {len(vertices)} vertices and {len(faces)} faces, expected some of both")
    if int(faces.min()) < 0 or int(faces.max()) >= len(vertices):
        raise ValueError(f"mesh {name} is broken: faces of vertices {int(faces.min())} to {int(faces.max())}, expected 0 to {len(vertices) - 1}")
    used = vertices[faces]
    if not torch.isfinite(used).all() or not float((used.amax((0, 1)) - used.amin((0, 1))).amin()) > 0:
        raise ValueError(f"mesh {name} is flat, or has vertices that are not finite: expected a body")
    return vertices, faces


def normalised(vertices: Float[Tensor, "V 3"], faces: Int64[Tensor, "F 3"]) -> tuple[Float[Tensor, "V 3"], Int64[Tensor, "F 3"]]:
    """The middle of the bounding box of all faces to 0, its longest side to 2 `FILL`."""
    used = vertices[faces].flatten(0, 1)
    low, high = used.amin(dim=0), used.amax(dim=0)
    return (vertices - (low + high) / 2) * (2 * FILL / (high - low).amax()), faces


def near(vertices: Float[Tensor, "V 3"], faces: Int64[Tensor, "F 3"], n: int, generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """Points uniform on the surface, each moved by a normal error of `SIGMA` in each direction."""
    return surfaces.points_on(vertices, faces, n, generator) + SIGMA * torch.randn(n, 3, generator=generator)


def winding(vertices: Float[Tensor, "V 3"], faces: Int64[Tensor, "F 3"], points: Float[Tensor, "n 3"]) -> Float64[Tensor, "n"]:
    """How often the surface goes around each point: 1 inside and 0 outside of a closed mesh whose faces look outward; with holes, in
    between. Faces far away count by their sum, to within some thousandths.

    Raises:
        ValueError: libigl is missing.

    Source: Barill et al. 2018, fast winding numbers, by libigl.
    """
    igl = extra("igl", "libigl", "winding numbers are computed by", "shapes")
    found = igl.fast_winding_number(vertices.double().numpy(), faces.numpy(), points.double().numpy())
    return torch.from_numpy(np.asarray(found, dtype=np.float64).reshape(-1))

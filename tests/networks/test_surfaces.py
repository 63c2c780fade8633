"""surfaces.py: level sets of known bodies."""

import math

import pytest
import torch

from pdiff_lib.networks import implicit, surfaces

pytest.importorskip("skimage")


def ball(side: int, radius: float = 0.7) -> torch.Tensor:
    """Above 0 inside a ball."""
    return (radius - implicit.raster(side, 3).norm(dim=1)).view(side, side, side)


def volume(vertices, faces) -> float:
    """By the divergence theorem: positive where faces look outward."""
    a, b, c = vertices[faces].double().unbind(dim=1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def test_the_surface_of_a_ball_is_on_it_and_looks_outward():
    vertices, faces = surfaces.marching_cubes(ball(40), 0.0)
    assert (vertices.norm(dim=1) - 0.7).abs().max() < 2e-3
    assert volume(vertices, faces) == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=0.01)
    points = surfaces.points_on(vertices, faces, 5000, torch.Generator().manual_seed(0))
    assert (points.norm(dim=1) - 0.7).abs().max() < 5e-3 and points.mean(dim=0).norm() < 0.03


def test_a_body_that_reaches_out_of_the_cube_is_closed_at_its_border():
    vertices, faces = surfaces.marching_cubes(torch.ones(6, 6, 6), 0.5)
    assert vertices.abs().max() == pytest.approx(1.0) and volume(vertices, faces) == pytest.approx(8, rel=0.05)


def test_an_axis_is_the_axis_of_the_raster():
    points = implicit.raster(30, 3)
    box = (1 - (points / torch.tensor([0.9, 0.5, 0.2])).abs().amax(dim=1)).view(30, 30, 30)
    vertices, _ = surfaces.marching_cubes(box, 0.0)
    torch.testing.assert_close(vertices.amax(dim=0), torch.tensor([0.9, 0.5, 0.2]), atol=0.02, rtol=0)


def test_nothing_inside_is_nothing_and_what_is_no_field_is_refused():
    vertices, faces = surfaces.marching_cubes(torch.zeros(4, 4, 4), 0.5)
    assert vertices.shape == (0, 3) and faces.shape == (0, 3)
    with pytest.raises(ValueError, match=r"64 of them not finite: expected finite ones \[s, s, s\]"):
        surfaces.marching_cubes(torch.full((4, 4, 4), torch.nan), 0.5)


@pytest.mark.parametrize("up", [1, 2])
def test_what_a_camera_sees_of_a_ball(up):
    lit = surfaces.seen(ball(41)[None], 0.0, up)[0]
    inside = torch.isfinite(lit)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 41) * 40 / 41] * 2, indexing="ij")
    assert torch.equal(inside, x**2 + y**2 < 0.7**2)
    row, column = divmod(int(lit.nan_to_num(0).argmax()), 41)
    assert row < 20 and column < 20, "lit from the upper left"
    assert 0 <= lit[inside].min() < lit[inside].max() <= 1


def test_which_side_is_up_and_which_is_seen():
    """A bar above a block, the bar nearer to the camera."""
    values = torch.zeros(1, 10, 10, 10)
    values[0, 2:8, 8, 7] = 1  # along x, at high y and high z
    values[0, 4:6, 2, 2] = 1
    lit = surfaces.seen(values, 0.5, up=1)[0]
    assert torch.isfinite(lit[1, 2:8]).all() and torch.isfinite(lit[7, 4:6]).all() and int(torch.isfinite(lit).sum()) == 8
    lit = surfaces.seen(values, 0.5, up=2)[0]  # from low y: the block is in front, at low z
    assert torch.isfinite(lit[2, 2:8]).all() and torch.isfinite(lit[7, 4:6]).all()
    with pytest.raises(ValueError, match="up is 0: expected 1 or 2"):
        surfaces.seen(values, 0.5, up=0)

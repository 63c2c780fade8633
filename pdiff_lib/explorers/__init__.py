"""Widgets to explore what has been computed; what the modules hold is handed on."""

from pdiff_lib.explorers.contest import Contest as Contest
from pdiff_lib.explorers.denoising import Denoising as Denoising
from pdiff_lib.explorers.forming import Fields as Fields
from pdiff_lib.explorers.scatter import Scatter as Scatter
from pdiff_lib.explorers.sweeps import Sweep as Sweep, settings as settings

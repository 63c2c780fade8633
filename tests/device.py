"""Where the tests compute: on CUDA where there is one, unless `PDIFF_TEST_DEVICE` names another device."""

import os

import torch

DEVICE = os.environ.get("PDIFF_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")

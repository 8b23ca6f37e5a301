"""What tests on a GPU need before the first of them."""

import os

# read once, when cuBLAS is first used; a run sets it before that (`training/accelerator.py`)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

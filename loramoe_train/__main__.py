"""`python -m loramoe_train` is `loramoe-train`, for torchrun and `accelerate launch -m`."""

from loramoe_train.cli import train

if __name__ == "__main__":
    train()

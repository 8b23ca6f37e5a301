"""Fine-tuning of language models with mixtures of LoRA experts. Import nothing heavy here: the CLI must start fast."""

__version__ = "0.1.0"

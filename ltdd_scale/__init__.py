"""Large-scale distillation of long-tailed image sets."""

__version__ = "0.1.0"

"""Learning gates by distillation."""

from seerattn.training.distill import DistillConfig as DistillConfig
from seerattn.training.distill import distill as distill

"""Training: learning the gates of a model, and a model together with its gates."""

from seerattn.training.distill import DistillConfig as DistillConfig
from seerattn.training.distill import distill as distill
from seerattn.training.finetune import FinetuneConfig as FinetuneConfig
from seerattn.training.finetune import finetune as finetune

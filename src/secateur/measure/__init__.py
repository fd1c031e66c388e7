"""How good and how fast a model is: perplexity, tasks and speed, dense or pruned alike."""

from secateur.measure.perplexity import perplexity
from secateur.measure.speed import speeds
from secateur.measure.tasks import Accuracy, kept, open_tasks, zero_shot

__all__ = ["Accuracy", "kept", "open_tasks", "perplexity", "speeds", "zero_shot"]

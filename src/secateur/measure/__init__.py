"""Quality and speed of a model, dense or pruned: perplexity, accuracy on tasks, tokens per second."""

from secateur.measure.perplexity import perplexity
from secateur.measure.speed import speeds
from secateur.measure.tasks import Accuracy, accuracy_ratio, open_tasks, zero_shot

__all__ = ["Accuracy", "accuracy_ratio", "open_tasks", "perplexity", "speeds", "zero_shot"]

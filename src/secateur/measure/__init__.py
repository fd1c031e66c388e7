"""How good and how fast a model is: perplexity, tasks and speed, dense or pruned alike."""

from secateur.measure.likelihood import log_likelihoods
from secateur.measure.perplexity import perplexity
from secateur.measure.speed import compare_speed, speed
from secateur.measure.tasks import Accuracy, kept, open_tasks, zero_shot

__all__ = ["Accuracy", "compare_speed", "kept", "log_likelihoods", "open_tasks", "perplexity", "speed", "zero_shot"]

"""How good and how fast a model is: perplexity, tasks and speed, dense or pruned alike."""

from secateur.measure.likelihood import Likelihood, log_likelihoods
from secateur.measure.perplexity import Perplexity, perplexity
from secateur.measure.speed import Speed, SpeedComparison, compare_speed, speed
from secateur.measure.tasks import Accuracy, Kept, TaskResult, kept, open_tasks, zero_shot

__all__ = [
    "Accuracy",
    "Kept",
    "Likelihood",
    "Perplexity",
    "Speed",
    "SpeedComparison",
    "TaskResult",
    "compare_speed",
    "kept",
    "log_likelihoods",
    "open_tasks",
    "perplexity",
    "speed",
    "zero_shot",
]

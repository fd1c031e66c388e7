"""How good and how fast a model is: perplexity and speed, dense or pruned alike."""

from secateur.evaluate.perplexity import Perplexity, perplexity
from secateur.evaluate.speed import Speed, SpeedComparison, compare_speed, speed

__all__ = ["Perplexity", "Speed", "SpeedComparison", "compare_speed", "perplexity", "speed"]

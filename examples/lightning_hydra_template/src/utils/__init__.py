from src.utils.instantiators import instantiate_callbacks, instantiate_loggers
from src.utils.utils import get_metric_value

__all__ = ["get_metric_value", "instantiate_callbacks", "instantiate_loggers"]

from typing import Any


def get_metric_value(metric_dict: dict[str, Any], metric_name: str | None) -> float | None:
    """The value of a metric logged in the LightningModule, for a sweep."""
    if not metric_name:
        return None
    if metric_name not in metric_dict:
        raise KeyError(f"Metric value not found! <metric_name={metric_name}>")
    return metric_dict[metric_name].item()

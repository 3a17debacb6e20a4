"""Checks of values in a model's configuration."""


def check_positive(config: object, *names: str) -> None:
    """Raise ValueError unless these fields are greater than 0; NaN is not."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{name}: must be greater than 0, not {value}")

"""Libraries that would show progress bars of their own."""

from __future__ import annotations


def no_bars() -> None:
    """Switch off the progress bars of the libraries: in a log they are noise, and one rank's are enough."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars as disable_hub_bars

    datasets.disable_progress_bars()
    disable_hub_bars()
    transformers.utils.logging.disable_progress_bar()

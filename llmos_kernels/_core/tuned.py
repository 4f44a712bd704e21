"""Where measured settings are: the package's folder ``tuned``, and the user's before it.

Both folders have the same layout: ``*.json`` are launch settings of GPUs, ``cpu/*.json`` say who
computes matrix products on CPUs, and ``gpu/*.json`` on GPUs.
"""

import os
from pathlib import Path

#: The settings that come with the package.
FOLDER = Path(__file__).parents[1] / "tuned"
#: How the names of files begin that hold rules instead of measured times.
RULES = "products"


def folders() -> list[Path]:
    """Return the folders with settings, the user's (``LLMOS_TUNED``) before that of the package."""
    user_folder = os.environ.get("LLMOS_TUNED")
    return [*([Path(user_folder)] if user_folder else []), FOLDER]


def missing_folder() -> str:
    """Return the user's folder if there is none of that name, else an empty string."""
    user_folder = os.environ.get("LLMOS_TUNED", "")
    return "" if not user_folder or Path(user_folder).is_dir() else user_folder

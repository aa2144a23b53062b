"""Names the commands of this package, for messages that tell a user what to run."""

import pathlib

# Subcommands of `dualpath`, and the scripts of a checkout that are the same commands.
SCRIPTS = {
    "prepare": "prepare_dataset",
    "convert": "convert_clip",
    "predict": "predict",
    "probe": "probe",
    "report": "report",
    "attention": "visualize_attention",
    "export": "export_model",
    "export-adapter": "export_adapter",
    "merge": "merge",
    "efficiency": "efficiency",
    "show-batch": "show_batch",
    "finetune": "finetune",
    "curve": "learning_curve",
}
_MAIN = "python -m dualpath_jax.main"  # in a checkout, `dualpath train`
_ROOT = pathlib.Path(__file__).parents[2]


def command_line(name: str) -> str:
    """Return how to run a subcommand here, "dualpath prepare", or its script in a checkout.

    Args:
      name: of `SCRIPTS`, or "train".
    """
    if name == "train":
        return _MAIN if (_ROOT / "scripts").is_dir() else "dualpath train"
    script = f"scripts/{SCRIPTS[name]}.py"
    return f"python {script}" if (_ROOT / script).is_file() else f"dualpath {name}"

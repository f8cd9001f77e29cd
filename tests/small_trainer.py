"""A trainer for a few updates on the CPU."""

import lightning as L


def trainer(folder, **arguments):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "default_root_dir": folder,
            **arguments,
        }
    )

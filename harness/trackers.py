"""Where else a run's numbers go, in process 0: --report-to tensorboard,wandb, in open_clip's words.

A package is imported only when it is asked for. What fails after the start is said once and ends no run.
"""
import argparse
import os
import sys
import uuid

from harness.processes import rank0
from tasks.images import one_line


class TensorBoard:
    """Event files in the run's folder, tensorboard/. What was written there after the checkpoint that the run
    goes on from does not count any more; in a new run nothing that was there does."""

    def __init__(self, out, config, step, goes_on):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1 if goes_on and step else 0)
        lines = [f"    {word}: {value}" for word, value in config.items()]          # indented: verbatim
        self.writer.add_text("config", "\n".join(lines), step)

    def log(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self):
        self.writer.flush()

    def close(self, status):
        self.writer.close()


class WandB:
    """A run of Weights & Biases; the file wandb-id keeps its id, under which the run goes on. The project is
    WANDB_PROJECT, or zero-shot-robustness; WANDB_MODE=offline writes to the run's folder alone, wandb/."""

    def __init__(self, out, config, step, goes_on):
        import wandb
        path = out / "wandb-id"
        if not (goes_on and path.exists()):
            path.unlink(missing_ok=True)                # it might be a link to somewhere else
            path.write_text(uuid.uuid4().hex)
        # console: what is printed stays as it is
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "zero-shot-robustness"), dir=out,
                              name=out.resolve().name[:128], id=path.read_text().strip(), resume="allow",
                              config=config, settings=wandb.Settings(console="off"))

    def log(self, step, values):
        self.run.log(values, step=step)

    def flush(self):
        pass                                            # its own process has it already

    def close(self, status):
        self.run.finish(exit_code=status)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}
NEEDS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb.sdk"}


def tracker_names(text):
    """The value of --report-to, for argparse: a comma list of TRACKERS, or none."""
    names = {"all": [*TRACKERS], "none": [], "": []}.get(text, text.split(","))
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: expected a comma list of {', '.join(TRACKERS)}; or "
                                         "all, or none")
    return ",".join(sorted({*names})) or "none"


class Trackers:
    """Those of --report-to; after `start` open in process 0, in the others never."""

    def __init__(self, report_to):
        """ValueError, in every process: the package of one cannot be imported in process 0."""
        self.names, self.open = [name for name in report_to.split(",") if name in TRACKERS], {}
        rank0(self.import_packages)

    def import_packages(self):
        for name in self.names:
            try:
                __import__(NEEDS[name])
            except Exception as error:                  # of other versions than it expects
                missing = isinstance(error, ModuleNotFoundError)
                raise ValueError(f"--report-to {name}: " + (f"pip install {name} first" if missing else
                                                            one_line(error))) from None

    def start(self, out, config, step, goes_on):
        """Open them: the run in this folder begins, or goes on after `step`. ValueError."""
        for name in self.names:
            try:
                self.open[name] = TRACKERS[name](out, config, step, goes_on)
            except Exception as error:                  # no account, no network, no room
                raise ValueError(f"--report-to {name}: {one_line(error)}") from None

    def tell(self, what, *facts):
        """Call a method of each that is open; one that fails is closed, with a warning."""
        for name, tracker in [*self.open.items()]:
            try:
                getattr(tracker, what)(*facts)
            except Exception as error:
                del self.open[name]
                print(f"\nwarning: --report-to {name} ends here: {one_line(error)}", file=sys.stderr)

    def report(self, step, results):
        """Log the table after training, of `evaluate_tasks`, and close them."""
        rows = results["tasks"] | results.get("adapted", {})
        values = {}
        for kind in ("clean", "robust"):
            values |= {f"val/{kind}": results["mean"][kind]} if results["tasks"] else {}
            values |= {f"val/{kind}/{task}": row[kind] for task, row in rows.items()}
        self.tell("log", step, values)
        self.tell("close", 0)

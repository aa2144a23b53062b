"""Lists the fuzzing targets and their shares of the inputs."""

from tests.fuzz.annotation_target import Annotations
from tests.fuzz.records_target import Records
from tests.fuzz.sandbox import Target
from tests.fuzz.video_target import Videos
from tests.fuzz.weights_target import Adapters, Backbones, Checkpoints, TorchCheckpoints
from tests.fuzz.workdir_target import Workdirs

TARGETS: dict[str, type[Target]] = {
    "annotations": Annotations,
    "backbones": Backbones,
    "checkpoints": Checkpoints,
    "torch": TorchCheckpoints,
    "adapters": Adapters,
    "records": Records,
    "workdirs": Workdirs,
    "videos": Videos,
}
# Parts of all inputs; targets with faster inputs get more.
SHARES = {
    "annotations": 0.35,
    "backbones": 0.15,
    "checkpoints": 0.1,
    "torch": 0.075,
    "adapters": 0.075,
    "records": 0.075,
    "workdirs": 0.1,
    "videos": 0.075,
}

"""Tells users what to try when a training learns nothing or does not generalize."""

import collections
import math


class TrainingAdvice:
    """Watches the log of one training and gives each of two pieces of advice once.

    Args:
      num_classes: of the data set.
    """

    # The last entries of the log that decide; one batch says little.
    NUM_ENTRIES = 5
    # Shares of ln(classes), the loss of guessing, between which nothing has been learned.
    STUCK = (0.97, 1.2)
    # From this training accuracy on, the model knows its clips by heart. A score on other videos
    # is low if it is below this share of the training accuracy.
    KNOWN, LOW = 0.98, 0.75

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._losses: collections.deque = collections.deque(maxlen=self.NUM_ENTRIES)
        self._accuracies: collections.deque = collections.deque(maxlen=self.NUM_ENTRIES)
        self._learning_rate = 0.0
        self._given: set[str] = set()

    def add_step(self, metrics: dict[str, float]) -> str | None:
        """Take the logged values of a training step; return advice or None."""
        self.add_accuracy(metrics)
        # While the learning rate still rises, a loss that stays says nothing.
        if metrics["learning_rate"] <= self._learning_rate:
            self._losses.append(metrics["loss"])
        self._learning_rate = metrics["learning_rate"]
        guessing = math.log(self._num_classes)
        low, high = (share * guessing for share in self.STUCK)
        stuck = all(low <= loss <= high for loss in self._losses)
        if len(self._losses) < self.NUM_ENTRIES or not stuck:
            return None
        return self._give(
            "stuck",
            f"the loss stays at {guessing:.2f} = ln({self._num_classes}), that of guessing: try "
            "other values of optimizer.learning_rate, optimizer.clip_norm=1.0 and, for dualpath, "
            "model.adapter_layer_norm=True; scripts/trainability.py of the repository shows "
            "whether a configuration can fit 32 clips, and `dualpath probe` whether the frozen "
            "backbone tells the classes apart",
        )

    def add_accuracy(self, metrics: dict[str, float]) -> None:
        """Take the accuracy of a training step that was logged before."""
        if "accuracy" in metrics:  # a loss function of one's own may not give it
            self._accuracies.append(metrics["accuracy"])

    def add_score(self, split: str, top1: float) -> str | None:
        """Take the top-1 of an evaluation; return advice or None."""
        if len(self._accuracies) < self.NUM_ENTRIES:
            return None
        accuracy = sum(self._accuracies) / len(self._accuracies)
        if accuracy < self.KNOWN or top1 >= self.LOW * accuracy:
            return None
        return self._give(
            "memorized",
            f"accuracy is {accuracy:.2f} in training and {top1:.2f} on {split}: the model knows "
            "the training clips by heart. Try what configs/finetune.py sets for small data, more "
            "augmentation (data.crop_scale, data.randaugment_layers), fewer steps, or more videos",
        )

    def _give(self, kind: str, text: str) -> str | None:
        """Return a line with the text the first time, then None."""
        if kind in self._given:
            return None
        self._given.add(kind)
        return f"hint: {text}"

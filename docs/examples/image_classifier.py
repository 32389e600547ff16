"""An image classifier: etude race docs/examples/image_classifier.py adamw muon "sgd(lr=0.1, momentum=0.9)"."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from etude.race import Task


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((-2, -1)))


def wrong(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(1) != labels).float()


def task(seed: int) -> Task:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    split = torch.Generator().manual_seed(0)  # the same parts whatever the seed
    train, valid, test = torch.utils.data.random_split(data, [0.6, 0.2, 0.2], split)
    torch.manual_seed(seed)  # it is the weights that differ
    return Task(
        model=Net(),
        train=DataLoader(train, batch_size=32, shuffle=True, drop_last=True),  # reshuffled by the race's own generator
        valid=DataLoader(valid, batch_size=256),
        test=DataLoader(test, batch_size=256),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        metric=wrong,
        name="error rate",
        steps=300,
    )

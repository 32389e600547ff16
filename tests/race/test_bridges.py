"""A LightningModule and a Hugging Face Trainer race as they are; the libraries are the real ones."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from etude.race import Cell, InputError, from_lightning, from_trainer, loop
from etude.race.subject import open_task
from etude.race.tasks import Found, find_task

HERE = Path(__file__).parent
rng = torch.Generator().manual_seed(0)
X = torch.randn(96, 4, generator=rng)
Y = (X[:, 0] * X[:, 1] > 0).long()
SGD = Cell("sgd", "tune", 0.1, 3)


def found(factory):
    return Found("mine", "mine", factory, "")


# -- Lightning --------------------------------------------------------------------------------------------------------

lightning = pytest.importorskip("lightning.pytorch")
torchmetrics = pytest.importorskip("torchmetrics")


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2, average="micro")

    def training_step(self, batch, i):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, i):
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.log_dict({"val_loss": nn.functional.cross_entropy(logits, batch[1])})

    def configure_optimizers(self):
        raise AssertionError("the recipe is the optimizer")


class ClassifierToTest(Classifier):
    def test_step(self, batch, i):
        self.log("test_loss", 2 * nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class Points(lightning.LightningDataModule):
    def setup(self, stage):
        self.parts = [TensorDataset(X[a:b], Y[a:b]) for a, b in ((0, 64), (64, 85), (85, 96))]

    def train_dataloader(self):
        return DataLoader(self.parts[0], 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 8)  # 8, 8 and 5: an average of batches is not one of examples


class PointsToTest(Points):
    def test_dataloader(self):
        return DataLoader(self.parts[2], 8)


def lit(seed):
    return from_lightning(Classifier(), Points(), steps=30)


def test_a_lightning_module_is_a_task_in_one_line_of_a_factory():
    task = open_task(found(lit), 0)
    assert (task.steps, task.name, task.minimize) == (30, "val_loss", True)
    outcome = loop.train(lit, Cell("adamw", "tune", 0.03, 3), steps=30)
    assert outcome.reason == ""
    assert outcome.curve[-1][2] < outcome.curve[0][2]
    assert loop.probe(lit, "adamw + dyt", lr=0.01, steps=4)["reason"] == ""


def test_lightning_validation_is_what_lightning_itself_computes():
    module = Classifier()
    trainer = lightning.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = trainer.validate(module, Points(), verbose=False)[0]
    for name, least in (("val_loss", True), ("val_accuracy", False)):
        task = from_lightning(module, Points(), steps=1, metric=name, minimize=least)
        assert task.measure(task.model, task.valid) == pytest.approx(own[name], rel=1e-6)
    with torch.no_grad():
        for p in module.net[-1].parameters():
            p.neg_()  # every guess is now the other; a metric that was not reset would still know the first ones
    assert task.measure(task.model, task.valid) == pytest.approx(1 - own["val_accuracy"], rel=1e-6)


def test_lightning_training_is_the_plain_loop_on_training_step():
    outcome = loop.train(lit, SGD, steps=8)
    torch.manual_seed(loop.stream_seed(3, "init"))
    module, (run, other) = Classifier(), (loop.Run(lit, SGD, steps=8, device="cpu") for _ in range(2))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(8):
        optimizer.param_groups[0]["lr"] = other.optimizer.param_groups[0]["lr"]
        (batch,), _ = next(run.stream)
        loss = nn.functional.cross_entropy(module.net(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        other.step()  # for its learning rate
    with torch.no_grad():
        expected = nn.functional.cross_entropy(module.net(X[64:85]), Y[64:85]).item()
    assert outcome.metric == pytest.approx(expected, rel=1e-5)


def test_lightning_test_data_give_the_verdict():
    def factory(seed):
        return from_lightning(ClassifierToTest(), PointsToTest(), steps=4)

    task = factory(0)
    with torch.no_grad():
        expected = 2 * nn.functional.cross_entropy(task.model.module.net(X[85:]), Y[85:]).item()
    assert task.measure(task.model, task.test) == pytest.approx(expected, rel=1e-6)
    tune, final = (loop.train(factory, Cell("sgd", stage, 0.1, 3), steps=4) for stage in ("tune", "final"))
    assert "" == tune.reason == final.reason
    assert tune.metric == final.curve[-1][3] != final.metric
    assert from_lightning(Classifier(), PointsToTest(), steps=4).test is None  # no test_step, no test


def test_a_pair_of_loaders_serves_for_a_datamodule():
    data = TensorDataset(X, Y)
    task = from_lightning(Classifier(), (DataLoader(data, 8, shuffle=True), DataLoader(data, 8)), steps=3)
    assert task.measure(task.model, task.valid) > 0


def manual():
    module = Classifier()
    module.automatic_optimization = False
    return module


class Hooked(Classifier):
    def on_train_batch_end(self, *args):
        pass


@pytest.mark.parametrize(
    "make, metric, said",
    [
        (manual, "val_loss", "optimizes by itself"),
        (Hooked, "val_loss", "Hooked has on_train_batch_end, which a race would not call"),
        (Classifier, "val_los", "validation_step logs no 'val_los'; it logs val_loss, val_accuracy"),
    ],
)
def test_a_lightning_module_that_cannot_race_is_refused_in_one_line(make, metric, said):
    with pytest.raises(InputError, match=said) as caught:
        task = from_lightning(make(), Points(), steps=3, metric=metric)
        task.measure(task.model, task.valid)
    assert "\n" not in str(caught.value)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, a, b):
        self.a, self.b = a, b

    def __len__(self):
        return self.b - self.a

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(self.a + i)
        ids = torch.randint(2, 30, (8,), generator=generator)
        return {"input_ids": ids, "labels": (ids.sum() % 2).item()}


def make_trainer(folder, **more):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=8, per_device_eval_batch_size=8, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)

    def metrics(found):
        guess = found.predictions.argmax(1)
        true = ((guess == 1) & (found.label_ids == 1)).sum()
        return {"f1": 2 * true / max(1, (guess == 1).sum() + (found.label_ids == 1).sum())}

    return transformers.Trainer(
        model=model, args=args, train_dataset=Rows(0, 32), eval_dataset=Rows(32, 53),
        **{"compute_metrics": metrics, **more},
    )  # fmt: skip


def hugging(tmp_path):
    return lambda seed: from_trainer(make_trainer(tmp_path))


def test_a_trainer_is_a_task_in_one_line_of_a_factory(tmp_path):
    factory = hugging(tmp_path)
    task = open_task(found(factory), 0)
    assert (task.steps, task.name) == (6, "eval_loss")
    outcome = loop.train(factory, Cell("adamw", "final", 1e-3, 3), steps=6)
    assert outcome.reason == ""
    assert loop.probe(factory, "adamw + rms_norm", lr=1e-3, steps=2)["reason"] == ""


def test_r1_the_trainers_data_are_reshuffled_by_the_generator_alone(tmp_path):
    task = from_trainer(make_trainer(tmp_path))

    def order(seed):
        batches = task.batches(torch.Generator().manual_seed(seed))
        return torch.cat([next(batches)[0][0]["input_ids"] for _ in range(8)])

    assert torch.equal(order(3), order(3))
    assert not torch.equal(order(3), order(4))
    assert not torch.equal(order(3)[:32], order(3)[32:])


@pytest.mark.parametrize("metric", ["eval_loss", "eval_f1"])
def test_a_trainers_metric_is_what_the_trainer_itself_computes(metric, tmp_path):
    trainer = make_trainer(tmp_path)
    own = trainer.evaluate()[metric]
    task = from_trainer(trainer, metric=metric)
    assert task.measure(task.model, task.valid) == pytest.approx(own, rel=1e-5)


def test_a_trainer_without_the_metric_is_refused(tmp_path):
    with pytest.raises(InputError, match="'eval_f1' needs compute_metrics, which this Trainer lacks"):
        from_trainer(make_trainer(tmp_path, compute_metrics=None), metric="eval_f1")
    task = from_trainer(make_trainer(tmp_path), metric="eval_accuracy")
    with pytest.raises(InputError, match="compute_metrics returns no 'accuracy'; it returns f1"):
        task.measure(task.model, task.valid)


# -- transformers without a Trainer -----------------------------------------------------------------------------------


def test_a_causal_lm_of_transformers_trains_on_its_logits():
    pytest.importorskip("transformers")
    example = find_task(str(HERE.parents[1] / "docs" / "examples" / "causal_lm.py"))
    outcome = loop.train(example.factory, Cell("adamw", "tune", 3e-3, 1), steps=6)
    assert outcome.reason == ""
    assert outcome.curve[-1][2] < outcome.curve[0][2]

"""skorch: a net with ``SAMNetMixin`` against the textbook."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, GradientNormClipping, LRScheduler
from skorch.hf import AccelerateMixin
from textbook import RHO, Net, assert_same_model, batches, grouped, once_in_two, textbook
from torch.nn.functional import cross_entropy

from fused_sam import FusedSAM
from fused_sam.integrations.skorch import SAMNetMixin


class Sam(SAMNetMixin, NeuralNetClassifier):
    pass


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def a_net(cls=Sam, **options):
    settings = {
        "optimizer": FusedSAM, "optimizer__base_optimizer": torch.optim.SGD,
        "optimizer__rho": RHO, "optimizer__momentum": 0.9, "lr": 0.1, "batch_size": 5,
        "max_epochs": 1, "train_split": None, "verbose": 0, "iterator_train__shuffle": False,
        "criterion": torch.nn.CrossEntropyLoss,
    }  # fmt: skip
    return cls(Net, **{**settings, **options}).initialize()


def joined(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_fit_is_the_textbook(clip):
    data = batches(6)
    callbacks = [LRScheduler("StepLR", step_size=1, gamma=0.7, step_every="batch")]
    if clip:
        callbacks.append(GradientNormClipping(clip))
    net = a_net(callbacks=callbacks)
    expected = copy.deepcopy(net.module_)
    net.partial_fit(*joined(data))

    groups = grouped(data, 1)
    base = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    losses = textbook(
        expected,
        base,
        groups,
        loss_fn,
        once_in_two(net.module_.drawn, groups),
        clip_norm=clip,
        after_step=torch.optim.lr_scheduler.StepLR(base, 1, 0.7).step,
    )
    assert_same_model(net.module_, expected)
    assert net.history[-1, "train_loss"] == pytest.approx(np.mean(losses), abs=1e-12)
    assert [b["train_loss"] for b in net.history[-1, "batches"]] == pytest.approx(losses, abs=1e-12)


def test_parameters_of_sam_are_searched_and_set_like_others():
    net = a_net()
    net.set_params(optimizer__rho=0.3)
    assert net.optimizer_.param_groups[0]["rho"] == 0.3
    net.set_params(module__features=6)  # everything is made anew, and attached anew
    net.partial_fit(*joined(batches(2)))
    once_in_two(net.module_.drawn, grouped(batches(2), 1))


def test_callbacks_get_the_second_gradients_once():
    class Counting(Callback):
        seen = 0

        def on_grad_computed(self, net, **kwargs):
            assert net.optimizer_.is_perturbed
            Counting.seen += 1

    a_net(callbacks=[Counting]).partial_fit(*joined(batches(3)))
    assert Counting.seen == 3


def test_a_net_is_pickled_and_goes_on():
    data = batches(4)
    net = a_net()
    net.module_.drop.p = 0.0
    net.partial_fit(*joined(data))
    again = pickle.loads(pickle.dumps(net))
    for each in (net, again):
        each.partial_fit(*joined(data))
    assert_same_model(net.module_, again.module_, atol=0)


def test_another_optimizer_is_left_alone():
    results = []
    for cls in (Sam, NeuralNetClassifier):
        torch.manual_seed(0)
        net = cls(
            Net, criterion=torch.nn.CrossEntropyLoss, lr=0.1, batch_size=5, max_epochs=1,
            train_split=None, verbose=0,
        )  # fmt: skip
        results.append(net.fit(*joined(batches(3))).module_)
    assert_same_model(*results, atol=0)


def test_two_optimizers_are_refused():
    class Two(Sam):
        def initialize_optimizer(self, *args, **kwargs):
            super().initialize_optimizer(*args, **kwargs)
            self.other_ = torch.optim.SGD(self.module_.parameters(), lr=0.1)
            return self

    with pytest.raises(RuntimeError, match="has several optimizers"):
        a_net(Two).partial_fit(*joined(batches(1)))


def test_skorchs_accelerate_mixin_is_refused():
    class Both(SAMNetMixin, AccelerateMixin, NeuralNetClassifier):
        pass

    net = a_net(Both, accelerator=Accelerator(cpu=True), device=None)
    with pytest.raises(RuntimeError, match=r"fused_sam\.integrations\.accelerate"):
        net.partial_fit(*joined(batches(1)))

"""What is measured between two reports."""

import math
import resource
import sys
from types import SimpleNamespace

import pytest
from helpers_unit import CPU

from utils.meter import Meter
from utils.progress import Progress, Steps

STEPS = Steps(steps_per_epoch=5, accumulation=1, epochs=4)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until its `now` is moved."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("utils.meter.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_times_are_those_since_the_last_report(clock):
    meter, progress = Meter(CPU), Progress()
    for seconds, images in ((3.0, 8), (1.0, 4)):
        clock.now += seconds
        meter.add_update(images)
        meter.add_data_seconds(0.5)
    report = meter.report(progress, STEPS, 0.1)
    assert (report.seconds, report.images_per_s, report.data_share) == (2.0, 3.0, 0.25)
    clock.now += 2.0
    meter.add_update(8)
    report = meter.report(progress, STEPS, 0.1)
    assert (report.seconds, report.images_per_s, report.data_share) == (2.0, 4.0, 0.0)


def test_losses_and_norms_are_means_of_the_updates_taken_since_the_last_report(clock):
    meter, progress = Meter(CPU), Progress()
    for loss, norm in ((1.0, 4.0), (2.0, 2.0)):
        progress.take(loss, norm)
        meter.add_update(4)
    progress.leave_out()
    meter.add_update(4)
    clock.now += 1
    report = meter.report(progress, STEPS, 0.1)
    assert (report.loss, report.grad_norm, report.left_out) == (1.5, 3.0, 1)
    progress.take(7.0, 9.0)
    meter.add_update(4)
    clock.now += 1
    report = meter.report(progress, STEPS, 0.1)
    assert (report.loss, report.grad_norm, report.left_out) == (7.0, 9.0, 1)


def test_a_window_that_a_resumed_run_takes_over_is_reported_whole(clock):
    progress = Progress()
    progress.take(1.0, 4.0)
    resumed = Progress()
    resumed.load_state_dict(progress.state_dict())
    meter = Meter(CPU)
    resumed.take(2.0, 2.0)
    meter.add_update(4)
    clock.now += 3
    report = meter.report(resumed, STEPS, 0.1)
    assert (report.loss, report.grad_norm) == (1.5, 3.0)
    assert report.seconds == 3.0


def test_without_an_update_taken_there_is_no_mean(clock):
    meter, progress = Meter(CPU), Progress()
    progress.leave_out()
    meter.add_update(4)
    clock.now += 1
    report = meter.report(progress, STEPS, 0.1)
    assert math.isnan(report.loss)
    assert math.isnan(report.grad_norm)
    assert report.images_per_s == 4.0


def test_places_and_time_left_are_counted_through_the_epochs_whether_taken_or_left_out(clock):
    meter, progress = Meter(CPU), Progress(epoch=3)
    progress.take(1.0, 1.0)
    progress.leave_out()
    meter.add_update(4)
    clock.now += 2
    report = meter.report(progress, STEPS, 0.25)
    assert (report.epoch, report.update, report.update_in_epoch, report.lr) == (3, 17, 2, 0.25)
    assert report.left_s == 2.0 * (20 - 17)
    assert report.memory_mb > 10


def test_peak_memory_is_told_in_bytes_by_macos(monkeypatch):
    def told():
        meter = Meter(CPU)
        meter.add_update(4)
        return meter.report(Progress(), STEPS, 0.25).memory_mb

    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    monkeypatch.setattr(sys, "platform", "linux")
    assert told() == 3 * 2**10
    monkeypatch.setattr(sys, "platform", "darwin")
    assert told() == 3

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ppow import PPOWConfig, PPOWDrafter
from ppow.training import checkpoints
from ppow.training.checkpoints import latest, load, prune, save, verify


class Toy(torch.nn.Module):
    """The least that a drafter owes to checkpoints."""

    def __init__(self, size: int = 4, dtype=torch.float32):
        super().__init__()
        self.layer = torch.nn.Linear(size, size, dtype=dtype)
        self.register_buffer("d2t", torch.arange(size))

    def save_pretrained(self, folder):
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")


def toy(size=4, dtype=torch.float32):
    torch.manual_seed(3)
    drafter = Toy(size, dtype)
    return drafter, torch.optim.AdamW(drafter.parameters(), lr=1 / 3, betas=(0.9, 0.95), weight_decay=0.1)


def train(drafter, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, drafter.layer.in_features, generator=generator).to(drafter.layer.weight.dtype)
        drafter.layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, dtype):
    drafter, optimizer = toy(dtype=dtype)
    train(drafter, optimizer, 5)
    optimizer.param_groups[0]["lr"] = 0.1 + 0.2  # a schedule's value, not a round one
    save(tmp_path, 5, drafter, optimizer, {"reward": 0.1 + 0.2, "note": "é"})
    train(drafter, optimizer, 5, start=5)

    other, other_optimizer = toy(dtype=dtype)
    state = load(latest(tmp_path), other, other_optimizer)
    assert state == {"reward": 0.1 + 0.2, "note": "é", "step": 5}
    assert other_optimizer.param_groups[0]["lr"] == 0.1 + 0.2
    assert other_optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    train(other, other_optimizer, 5, start=5)
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    expected, found = optimizer.state_dict(), other_optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for index, entries in expected["state"].items():
        assert set(entries) == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in entries.items():
            assert torch.equal(tensor, found["state"][index][name]), (index, name)
            assert tensor.dtype == found["state"][index][name].dtype


def test_a_real_drafter_goes_through_and_stays_loadable_by_itself(tmp_path):
    config = PPOWConfig(
        vocab_size=32,
        draft_vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        target_num_layers=4,
    )
    drafter = PPOWDrafter(config)
    ids = torch.arange(8) * 4
    drafter.set_draft_vocabulary(ids - torch.arange(8), torch.zeros(32, dtype=torch.bool).index_fill_(0, ids, True))
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-3)
    drafter(torch.arange(6)[None], torch.randn(1, 6, 48)).logits.sum().backward()
    optimizer.step()
    path = save(tmp_path, 1, drafter, optimizer, {})

    other = PPOWDrafter(config)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    load(path, other, other_optimizer)
    alone = PPOWDrafter.from_pretrained(path)
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]) and torch.equal(tensor, alone.state_dict()[name]), name
    saved = optimizer.state_dict()["state"]
    assert all(torch.equal(saved[i]["exp_avg"], other_optimizer.state_dict()["state"][i]["exp_avg"]) for i in saved)


def test_an_optimizer_that_has_not_stepped_yet(tmp_path):
    drafter, optimizer = toy()
    load(save(tmp_path, 0, drafter, optimizer, {}), *toy())


def test_latest_is_by_number_and_none_without_checkpoints(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    for step in (9, 1_000_000, 20):
        save(tmp_path, step, *toy(), {})
    assert latest(tmp_path).name == "step-1000000"


def test_keep_last_removes_the_oldest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, *toy(), {}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        prune(tmp_path, 0)


def test_an_existing_step_is_never_overwritten_unless_damaged(tmp_path):
    path = save(tmp_path, 1, *toy(), {"run": "first"})
    with pytest.raises(ValueError, match="step-000001 exists already; resume from it"):
        save(tmp_path, 1, *toy(), {"run": "second"})
    assert verify(path)["state"] == {"run": "first"}
    (path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 1, *toy(), {"run": "second"})
    assert verify(path)["state"] == {"run": "second"}
    assert [child.name for child in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"tensor": torch.zeros(1)}, {1j: 2}])
def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, state):
    with pytest.raises(ValueError, match="state of step 1 cannot be written as JSON"):
        save(tmp_path / "run", 1, *toy(), state)
    assert not (tmp_path / "run").exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", cut, "model.safetensors is damaged: .* bytes"),
        ("model.safetensors", flip, "model.safetensors is damaged"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("optimizer.safetensors", cut, "optimizer.safetensors is damaged"),
        ("optimizer.safetensors", flip, "optimizer.safetensors is damaged"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("state.json", cut, "state.json is damaged"),
        ("state.json", Path.unlink, "not a complete checkpoint: state.json is missing"),
        ("state.json", lambda path: path.write_text("{}"), "state.json is damaged"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, caplog, file, damage, message):
    good = save(tmp_path, 1, *toy(), {})
    bad = save(tmp_path, 2, *toy(), {})
    damage(bad / file)
    drafter, optimizer = toy()
    with torch.no_grad():
        drafter.layer.weight.fill_(7.0)
    with pytest.raises(ValueError, match=message):
        load(bad, drafter, optimizer)
    assert bool((drafter.layer.weight == 7.0).all()), "a refused checkpoint leaves the drafter alone"
    assert latest(tmp_path) == good
    assert "Skipping a checkpoint" in caplog.text and "step-000002" in caplog.text


def test_a_checkpoint_of_another_drafter_is_refused(tmp_path):
    path = save(tmp_path, 1, *toy(4), {})
    drafter, optimizer = toy(5)
    with pytest.raises(ValueError, match="another drafter; .* d2t, layer.bias, layer.weight"):
        load(path, drafter, optimizer)
    with pytest.raises(ValueError, match="another drafter"):
        load(path, *toy(4, torch.bfloat16))


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    path = save(tmp_path, 1, *toy(), {})
    drafter, _ = toy()
    optimizer = torch.optim.AdamW([drafter.layer.weight])
    with pytest.raises(ValueError, match=r"over \[2\] parameters per group, this one has \[1\]"):
        load(path, drafter, optimizer)


# -- a full disk -------------------------------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "module, name", [("os", "fsync"), ("os", "rename"), ("checkpoints", "save_file"), ("toy", "save")]
)
def test_a_full_disk_leaves_nothing_partial(tmp_path, monkeypatch, module, name):
    before = save(tmp_path, 1, *toy(), {})
    owner = {"os": checkpoints.os, "checkpoints": checkpoints, "toy": Toy}[module]
    monkeypatch.setattr(owner, {"save": "save_pretrained"}.get(name, name), no_space)
    with pytest.raises(OSError, match=r"step-000002: .*No space left on device.* needs about \d+ bytes, \d+ are free"):
        save(tmp_path, 2, *toy(), {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert latest(tmp_path) == before
    save(tmp_path, 2, *toy(), {})
    assert latest(tmp_path).name == "step-000002"


RUN = [sys.executable, "-c"]
HEAD = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from ppow.training import checkpoints
    class Toy(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.layer = torch.nn.Linear(size, size)
        def save_pretrained(self, folder):
            save_file(self.state_dict(), folder / "model.safetensors")
    def toy(size):
        drafter = Toy(size)
        optimizer = torch.optim.AdamW(drafter.parameters())
        drafter.layer(torch.ones(size)).sum().backward()
        optimizer.step()
        return drafter, optimizer
    folder = Path(sys.argv[1])
"""


def program(body: str) -> list[str]:
    return [*RUN, textwrap.dedent(HEAD) + textwrap.dedent(body)]


@pytest.mark.parametrize("limit", [1_000, 4_500_000])
def test_writes_that_the_system_really_refuses(tmp_path, limit):
    """RLIMIT_FSIZE makes the kernel refuse: within the drafter's file, and within the optimizer's (4 and 8 MB)."""
    body = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
        try:
            checkpoints.save(folder, 1, *toy(1000), {})
        except OSError as error:
            print(error)
    """
    done = subprocess.run([*program(body), tmp_path, str(limit)], capture_output=True, text=True)
    assert "Could not write the checkpoint" in done.stdout and "It needs about" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


# -- a kill ------------------------------------------------------------------------------------------------------------


def test_a_kill_at_every_system_call_leaves_a_usable_folder(tmp_path):
    """Child n dies at its n-th write, sync, rename or removal; the last child lives. One process forks them all."""
    body = """
        calls = 0
        def deadly(function, number):
            def wrapped(*arguments, **keywords):
                global calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)
            return wrapped
        first, second = toy(4), toy(4)
        for number in range(1, 200):
            here = folder / str(number)
            checkpoints.save(here, 1, *first, {})
            child = os.fork()
            if child == 0:
                for module, name in [(os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]:
                    setattr(module, name, deadly(getattr(module, name), number))
                checkpoints.save_file = deadly(checkpoints.save_file, number)
                Toy.save_pretrained = deadly(Toy.save_pretrained, number)
                Path.write_text = deadly(Path.write_text, number)
                checkpoints.save(here, 2, *second, {}, keep_last=1)
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
        print(number)
    """
    done = subprocess.run([*program(body), tmp_path], capture_output=True, text=True, check=True)
    last = int(done.stdout)
    assert last > 12, "the kill points were reached"
    seen = set()
    for number in range(1, last + 1):
        folder = tmp_path / str(number)
        found = latest(folder)
        assert found is not None, number
        seen.add(found.name)
        for path in folder.glob("step-*"):
            verify(path)  # whatever carries a checkpoint's name is complete
        save(folder, 3, *toy(), {}, keep_last=1)
        assert [path.name for path in folder.iterdir()] == ["step-000003"], "the next save cleans up"
    assert seen == {"step-000001", "step-000002"}


def test_a_kill_at_a_random_moment_of_a_large_write(tmp_path):
    body = """
        drafter, optimizer = toy(1500)
        for step in range(1, 1000):
            checkpoints.save(folder, step, drafter, optimizer, {"step": step}, keep_last=2)
            print(step, flush=True)
    """
    child = subprocess.Popen([*program(body), tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(3):
            reported = int(child.stdout.readline())
        time.sleep(random.Random(0).random() * 0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    found = latest(tmp_path)
    assert verify(found)["state"]["step"] >= reported
    for path in tmp_path.glob("step-*"):
        verify(path)


def test_a_foreign_folder_with_the_name_of_a_checkpoint_is_ignored(tmp_path):
    good = save(tmp_path, 1, *toy(), {})
    (tmp_path / "step-000007").mkdir()
    (tmp_path / "step-final").mkdir()
    (tmp_path / "step-000009").write_text("a file")
    shutil.copytree(good, tmp_path / ".unfinished-step-000008")
    assert latest(tmp_path) == good


def test_state_json_is_readable_by_people(tmp_path):
    record = json.loads((save(tmp_path, 12, *toy(), {"epoch": 1}) / "state.json").read_text())
    assert record["step"] == 12 and record["state"] == {"epoch": 1}
    assert set(record["files"]) == {"config.json", "model.safetensors", "optimizer.safetensors"}

"""Results are shown again, and runs go on, with the same images wherever they lie, and with no others."""
import json
import os
import shutil

import pytest
from in_process import here
from noise import change_one_pixel, draw
from runs import assert_same, contents

from tasks.make_cache import make_cache


def elsewhere(folder, to):
    """A copy with new times, as on a job's own disk."""
    shutil.copytree(folder, to)
    for path in to.rglob("*.png"):
        os.utime(path)
    return to


@pytest.fixture
def photos(tmp_path):
    """{train,val}/{red,blue}/*.png, 8 and 3 of each class."""
    root = tmp_path / "photos"
    for number in range(22):
        split, name = ("train", "val")[number >= 16], ("red", "blue")[number % 2]
        draw(root / split / name / f"{number}.png", number)
    return root


# ------------------------------------------------------------------------------ evaluations
def evaluation(folder, out, *more, status=0):
    words = ("--pretrained", "none", "--device", "cpu", "--steps", 1, "--workers", 0, "--out", out)
    done = here("eval_zeroshot.py", *words, "--tasks", f"folder:{folder}", *more, status=status)
    assert not status or done.stderr.count("\n") == 1 and not done.stdout
    return done.stdout or done.stderr


def test_a_finished_evaluation_is_shown_of_the_same_images_alone(photos, tmp_path, monkeypatch):
    out, again = tmp_path / "out", "nothing was computed"
    evaluation(photos, out)
    kept = contents(out)
    with monkeypatch.context() as patch:                # nothing is read where no file was touched
        patch.setattr("harness.evaluation.other_contents", lambda *_: pytest.fail("reads"))
        shown = evaluation(photos, out)
        assert again in shown and f"| folder:{photos} | 6 |" in shown
    copy = elsewhere(photos, tmp_path / "copy")
    shown = evaluation(copy, out)
    assert again in shown and f"| folder:{copy} | 6 |" in shown and f"| folder:{photos} |" not in shown
    assert f"folder:{copy}: val images of {copy}/val; " in shown
    photos = photos.rename(tmp_path / "renamed")
    assert again in evaluation(photos, out)
    cache = tmp_path / "cache.npy"
    make_cache(f"folder:{photos}", cache, size=32)
    assert again in evaluation(photos, out, "--tasks", f"cache:{cache}")

    victim, other = photos / "val" / "red" / "18.png", photos / "val" / "blue" / "19.png"
    before = victim.read_bytes()
    change_one_pixel(victim)
    refused = evaluation(photos, out, status=2)
    assert f"1 of 6 have other contents: {victim}; " in refused and "--overwrite" in refused
    victim.write_bytes(before)
    assert again in evaluation(photos, out)
    victim.write_bytes(b"")
    assert str(victim) in evaluation(photos, out, status=2)
    victim.write_bytes(before)
    draw(photos / "val" / "red" / "99.png", 99)
    assert "number of images 7 of 7 (before: 6 of 6)" in evaluation(photos, out, status=2)
    (photos / "val" / "red" / "99.png").unlink()
    (photos / "val" / "red").rename(photos / "val" / "crimson")
    assert "other class names" in evaluation(photos, out, status=2)
    (photos / "val" / "crimson").rename(photos / "val" / "red")
    victim.write_bytes(other.read_bytes())
    other.write_bytes(before)
    refused = evaluation(photos, out, status=2)
    assert "2 of 6 have other contents" in refused and str(other) in refused and contents(out) == kept
    # and another is not computed as if it were this one
    assert "wrote " in evaluation(photos, out, "--overwrite") and again in evaluation(photos, out)


def test_what_could_not_be_read_and_can_be_now_is_another_result(photos, tmp_path):
    victim = photos / "val" / "red" / "18.png"
    before = victim.read_bytes()
    victim.write_bytes(b"")
    evaluation(photos, tmp_path / "out")
    assert "nothing was computed" in evaluation(photos, tmp_path / "out")
    victim.write_bytes(before)
    assert f"1 of 6 have other contents: {victim}" in evaluation(photos, tmp_path / "out", status=2)


def test_an_unfinished_evaluation_goes_on_with_what_it_began_with(photos, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    evaluation(photos, whole)
    lines = (whole / "images.jsonl").read_text().splitlines(keepends=True)
    done = [json.loads(line)["image"] for line in lines[1:4]]
    copy = elsewhere(photos, tmp_path / "copy")
    files = sorted((copy / "val").rglob("*.png"))

    def killed():
        out.mkdir(exist_ok=True)
        (out / "images.jsonl").write_text("".join(lines[:4]))
        (out / "results.json").unlink(missing_ok=True)
    killed()
    assert "going on: 3 of 6" in evaluation(copy, out)
    assert sorted((out / "images.jsonl").read_text().splitlines()[1:]) == sorted(
        line.rstrip().replace(str(photos), str(copy)) for line in lines[1:])
    killed()
    later = next(number for number in range(6) if number not in done)
    change_one_pixel(files[later])                      # of which nothing is known yet
    assert "going on: 3 of 6" in evaluation(copy, out)
    killed()
    change_one_pixel(files[done[0]])
    assert f"1 of 3 have other contents: {files[done[0]]}" in evaluation(copy, out, status=2)


def test_results_without_checksums_are_shown_with_a_note(photos, tmp_path):
    out = tmp_path / "out"
    evaluation(photos, out)
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    rows[0]["made_of"] = {name: "0123456789abcdef" for name in rows[0]["made_of"]}
    for row in rows[1:]:
        row.pop("crc32")
    (out / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = evaluation(photos, out)
    assert "nothing was computed" in shown
    assert f"note: folder:{photos}: whether its images have changed since is not known" in shown


def test_sets_that_came_or_went_under_the_data_root(photos, tmp_path):
    """The first are evaluated; of the others no results are shown as if they were there, nor lost."""
    out, tasks = tmp_path / "out", f"digits,folder:{photos}"
    evaluation(photos, out, "--tasks", tasks, "--limit", 4)
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())

    def rewrite(spelled, sets):
        """As if --tasks all had found these sets."""
        rows[0]["evaluation"]["tasks"] = spelled
        rows[0]["made_of"] = {name: rows[0]["made_of"][name] for name in sets}
        results["tasks"] = {name: results["tasks"][name] for name in sets}
        some = [row for row in rows if row.get("task", sets[0]) in sets]
        (out / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        (out / "results.json").write_text(json.dumps(results))
    rewrite("digits", ["digits", f"folder:{photos}"])
    refused = evaluation(photos, out, "--tasks", "digits", "--limit", 4, status=2)
    assert f"an evaluation of folder:{photos} too, which is not found here" in refused
    rewrite(tasks, [f"folder:{photos}"])
    assert "going on: 4 of 8" in evaluation(photos, out, "--tasks", tasks, "--limit", 4)
    assert (out / "images.jsonl").read_bytes().count(b"crc32") == 8


# ------------------------------------------------------------------------------ training
def training(forks, out, *words, status=0):
    stdout, stderr = forks.run("train_tecoa.py", *words, "--out", out, out=f"{out}-printed", status=status)
    assert not status or stderr.count("\n") == 1
    return stderr if status else stdout


def test_training_goes_on_and_is_shown_with_the_same_images_alone(forks, photos, tmp_path):
    out, copy = tmp_path / "run", elsewhere(photos, tmp_path / "copy")
    words = ("--pretrained", "none", "--tasks", "none", "--batch-size", 4, "--eval-steps", 1,
             "--max-steps", 3, "--save-every", 1, "--workers", 0)

    def run(folder, *more, kind="folder", **how):
        return training(forks, out, *words, "--dataset", f"{kind}:{folder}", *more, **how)
    assert "wrote " in run(photos)
    whole, again = shutil.copytree(out, tmp_path / "whole"), "is finished, after step 3"
    kept = contents(out)
    cache = tmp_path / "cache.npy"
    make_cache(f"folder:{photos}", cache, size=32)
    for folder, kind in ((copy, "folder"), (cache, "cache")):
        shown = run(folder, kind=kind)
        assert again in shown and "warning" not in shown
        # as if killed after its second step
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        (out / "ckpt-previous.pt").replace(out / "ckpt.pt")
        (out / "results.json").unlink()
        assert "Going on after step 2" in run(folder, "--resume", kind=kind)
        assert_same(out, whole)

    shutil.rmtree(out)
    shutil.copytree(whole, out)
    # a pixel of an image that is in the sample, as all are of so few
    victim = copy / "train" / "red" / "4.png"
    change_one_pixel(victim)
    said = f"other pixels in 1 of the 16 images compared: {victim}"
    assert again in run(photos) and "finished run; at other places" in run(copy, status=2)
    shutil.rmtree(photos)
    shutil.copytree(copy, photos)
    shown = run(photos)
    assert again in shown and said.replace(str(copy), str(photos)) in shown and "warning: its images" in shown
    (out / "results.json").unlink()
    (out / "ckpt-previous.pt").replace(out / "ckpt.pt")
    assert f"with: {said}; " in run(copy, "--resume", status=2)
    shutil.copytree(whole, out, dirs_exist_ok=True)
    shutil.rmtree(photos)
    shown = run(photos)
    assert again in shown and "is not known: no such folder" in shown
    # of an earlier version
    results = json.loads((out / "results.json").read_text())
    del results["data"]
    (out / "results.json").write_text(json.dumps(results))
    shown = run(copy, status=2)
    assert "whether its images have changed since is not known" in run(photos) and "--overwrite" in shown
    assert kept.keys() == contents(whole).keys()

"""Reading images, folders and tables: every format, every clear sentence, nothing lost."""

import sys

import numpy as np
import pytest
from conftest import TINY, command, run
from PIL import Image

import common
from common import Items, RecipeError, find_images, open_records, picture, read_image, read_table

RAMP = np.linspace(0, 255, 40 * 44).reshape(40, 44).astype(np.uint8)


def save(path, array, mode=None, **more):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **more)
    return path


def test_gray_and_colour(tmp_path):
    assert (read_image(save(tmp_path / "g.png", RAMP)) == RAMP).all()
    colour = np.stack([RAMP, 255 - RAMP, RAMP // 2], 2)
    assert (read_image(save(tmp_path / "c.png", colour)) == colour).all()
    one = read_image(save(tmp_path / "1.png", (RAMP > 127)))
    assert set(np.unique(one)) == {0, 255} and one.shape == (40, 44)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = read_image(save(tmp_path / "16.png", RAMP.astype(np.uint16) * 257))
    assert deep.dtype == np.uint8 and (deep == RAMP).all()
    assert (read_image(save(tmp_path / "16.tif", RAMP.astype(np.uint16) * 257)) == RAMP).all()
    floats = read_image(save(tmp_path / "f.tif", (RAMP / 255).astype(np.float32)))
    assert abs(floats.astype(int) - RAMP).max() <= 1
    wide = read_image(save(tmp_path / "32.tif", RAMP.astype(np.int32) * 100_000))
    assert abs(wide.astype(int) - RAMP).max() <= 1


def test_palette_alpha_and_cmyk(tmp_path):
    colour = np.stack([RAMP, 255 - RAMP, RAMP // 2], 2)
    palette = read_image(save(tmp_path / "p.png", colour, "P"))
    assert palette.shape == (40, 44, 3) and abs(palette.astype(int) - colour).mean() < 20
    assert (read_image(save(tmp_path / "p.gif", RAMP)) == RAMP).all()  # a gray palette stays gray
    clear = np.dstack([colour, np.where(RAMP > 100, 255, 0).astype(np.uint8)])
    shown = read_image(save(tmp_path / "a.png", clear))
    assert (shown[RAMP <= 100] == 255).all() and (shown[RAMP > 100] == colour[RAMP > 100]).all()
    assert read_image(save(tmp_path / "k.jpg", colour, "CMYK")).shape == (40, 44, 3)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to show
    assert read_image(save(tmp_path / "e.jpg", RAMP, exif=exif)).shape == (44, 40)


def broken_files(folder):
    """The bad files of the issue beside good ones in unusual formats; returns the names of the bad ones."""
    colour = np.stack([RAMP, 255 - RAMP, RAMP // 2], 2)
    for i in range(12):
        save(folder / f"good {i}.png", np.roll(colour, 3 * i, 0))
    save(folder / "sixteen.png", RAMP.astype(np.uint16) * 257)
    save(folder / "palette.png", colour, "P")
    save(folder / "三像素.png", RAMP[:3, :3])
    (folder / "words.png").write_text("This is no picture.")
    data = save(folder / "cut.jpg", colour, quality=95).read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    return {"三像素.png", "words.png", "cut.jpg"}


def test_bad_files_are_named_and_replaced_in_a_folder_with_spaces_and_chinese(tmp_path):
    folder = tmp_path / "我的 照片"
    folder.mkdir()
    bad = broken_files(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    done = run(command("--data_dir", folder, "--out_dir", tmp_path / "结果 1", *TINY, drive={}))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Bad ")]
    assert {name for name in bad if any(name in line for line in lines)} == bad and len(lines) == 3
    assert "3 x 3 pixels; it takes 24 at least" in done.stdout or "3 x 3 pixels; it takes 17" in done.stdout
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert (tmp_path / "结果 1" / "metrics.json").exists()


def test_too_many_bad_files_stop_the_run(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.png").write_text("no picture") if i < 4 else save(tmp_path / f"{i}.png", RAMP)
    with pytest.raises(RecipeError, match=r"\d of 10 training files cannot be used: .*\d.png"):
        Items(sorted(tmp_path.iterdir()), read_image)


def test_a_bad_slot_takes_the_next_good_file(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", np.full((4, 4), i, np.uint8))
    (tmp_path / "5.png").write_text("no picture")
    for share in (0.5, 0.0):  # cached, and read each time
        items = Items(sorted(tmp_path.iterdir()), read_image, share=share)
        assert items.cached is (share > 0) and len(items) == 6
        assert [int(items[i][0, 0]) for i in range(6)] == [0, 1, 2, 3, 4, 0]


def test_a_bug_in_load_item_is_not_taken_for_a_bad_file(tmp_path):
    save(tmp_path / "a.png", RAMP)
    with pytest.raises(ZeroDivisionError):
        Items([tmp_path / "a.png"], lambda path: 1 / 0)


@pytest.mark.parametrize("case", ["missing", "empty", "without", "file", "dicom"])
def test_wrong_folders_are_sentences(tmp_path, case):
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    save(photos / "a.png", RAMP)
    place = tmp_path / "data" / "photo"
    expected = []
    if case == "missing":
        expected = [str(place), "no such folder", f"nearest folder with such files is {photos}"]
    elif case == "file":
        place = photos / "a.png"
        expected = ["is a file", "give the folder"]
    else:
        place.mkdir()
        expected = [str(place), "no file" if case == "empty" else "3 .txt" if case == "without" else "2 .dcm"]
        for i in range(3 if case == "without" else 0):
            (place / f"{i}.txt").write_text("x")
        for i in range(2 if case == "dicom" else 0):
            (place / f"{i}.dcm").write_text("x")
        expected += ["dcm2niix"] if case == "dicom" else []
    done = run(command("--data_dir", place, "--out_dir", tmp_path / "run", drive={}), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr
    assert not (tmp_path / "run" / "last.pt").exists()


def test_tables(tmp_path):
    save(tmp_path / "a.png", RAMP)
    (tmp_path / "t.csv").write_text(
        "image,mask,label,split,group\na.png,m/a.png,cat,train,p1\nb.png,,dog,val,p2\n", encoding="utf-8"
    )
    rows = read_table(tmp_path / "t.csv")
    assert rows[0]["image"] == tmp_path / "a.png" and rows[0]["mask"] == tmp_path / "m" / "a.png" and rows[1]["label"] == "dog"
    for text, part in (("", "no rows"), ("file,label\na.png,1\n", "file, label")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(RecipeError, match=part):
            read_table(tmp_path / "bad.csv")
    (tmp_path / "gbk.csv").write_bytes("image\n照片.png\n".encode("gbk"))
    with pytest.raises(RecipeError, match="UTF-8"):
        read_table(tmp_path / "gbk.csv")
    (tmp_path / "excel.csv").write_text("\ufeffimage\na.png\n", encoding="utf-8")
    assert len(read_table(tmp_path / "excel.csv")) == 1
    with pytest.raises(RecipeError, match="none.csv"):
        read_table(tmp_path / "none.csv")


def test_splits(tmp_path, config):
    lines = [f"{i}.png,{'val' if i % 5 == 0 else 'train'},patient{i // 5}" for i in range(40)]
    table = tmp_path / "t.csv"

    def split(text, **changes):
        table.write_text(text)
        train, val = open_records(config(data_dir=str(table), **changes))
        return [{r["image"].name for r in part} for part in (train, val)], train, val

    (train, val), _, _ = split("image,split\n" + "\n".join(",".join(line.split(",")[:2]) for line in lines))
    assert val == {f"{i}.png" for i in range(0, 40, 5)} and len(train) == 32
    with pytest.raises(RecipeError, match="group 'patient0' on both sides"):
        split("image,split,group\n" + "\n".join(lines))
    text = "image,group\n" + "\n".join(f"{i}.png,patient{i // 5}" for i in range(40))
    names, train, val = split(text)
    assert not {r["group"] for r in train} & {r["group"] for r in val} and len(val) == 5
    assert split(text)[0] == names and split(text, seed=1)[0] != names
    thin, _, _ = split(text, sample_ratio=0.2)
    assert len(thin[0]) == 7 and thin[0] < names[0] and thin[1] == names[1]


def test_validation_images_inside_the_training_folder_are_not_trained_on(images, tmp_path, config):
    for place in ("", "val"):
        (tmp_path / "d" / place).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            save(tmp_path / "d" / place / f"{i}.png", RAMP)
    train, val = open_records(config(data_dir=str(tmp_path / "d"), val_dir=str(tmp_path / "d" / "val")))
    assert [r["image"].parent.name for r in train] == ["d"] * 3 and [r["image"].parent.name for r in val] == ["val"] * 3


def test_the_split_is_the_same_in_every_process(images, tmp_path):
    """Equal names in many folders tie in the shuffle; the hash seed of Python must not decide."""
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        for j in range(3):
            (tmp_path / f"{i}" / f"{j}.png").write_bytes(b"")
    code = (
        "import sys, common; cfg = common.Settings(data_dir=sys.argv[1]); "
        "print([str(r['image']) for r in common.open_records(cfg)[1]])"
    )
    seen = {run([sys.executable, "-c", code, str(tmp_path)], PYTHONHASHSEED=seed).stdout for seed in "12"}
    assert len(seen) == 1 and len(next(iter(seen)).split(",")) == 6


def test_free_memory_sees_the_limit_of_a_container(monkeypatch):
    files = {"/proc/meminfo": "MemAvailable: 8000000 kB", "/proc/self/cgroup": "4:cpu:/\n3:memory:/job/7\n0::/user/a"}
    files |= {"/sys/fs/cgroup/user/memory.max": "5000", "/sys/fs/cgroup/user/memory.current": "1000"}
    files |= {"/sys/fs/cgroup/memory.max": "max", "/sys/fs/cgroup/memory.current": "1"}

    def read(path, *more, **options):
        if path.as_posix() not in files:
            raise FileNotFoundError(path)
        return files[path.as_posix()]

    monkeypatch.setattr(common.Path, "read_text", read)
    assert common.free_memory() == 4000
    job = "/sys/fs/cgroup/memory/job/7/memory."
    files |= {job + "limit_in_bytes": "3000", job + "usage_in_bytes": "500"}
    assert common.free_memory() == 2500
    files.clear()
    assert common.free_memory() == 4 * 2**30


def test_the_file_list_of_a_run_is_fixed(srcnn, config, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    srcnn.train(config(data_dir=str(folder), num_steps=2))
    save(folder / "0new.png", RAMP)
    next(p for p in sorted(folder.iterdir(), reverse=True)).unlink()
    metrics = srcnn.train(config(data_dir=str(folder), num_steps=4))
    out = capsys.readouterr().out
    assert metrics["steps"] == 4 and "new since the run began" in out and "are gone" in out


def test_images_below_hidden_names_are_left_out(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    save(tmp_path / "deep" / "er" / "a.PNG", RAMP, format="PNG")
    (tmp_path / "._a.png").write_bytes(b"a Mac's shadow of a file")
    assert [p.name for p in find_images(tmp_path)] == ["a.PNG"]


def test_ram_limits_the_cache(monkeypatch, tmp_path):
    paths = [save(tmp_path / f"{i:03d}.png", RAMP) for i in range(130)]
    monkeypatch.setattr(common, "free_memory", lambda: 2 * 100 * RAMP.nbytes)
    items = Items(paths, read_image)
    assert not items.cached and len(items.kept) == 128 and (items[129] == RAMP).all()


def test_picture_places_every_cell():
    sheet = np.asarray(picture([[RAMP, RAMP[:10]], [255 - RAMP, np.dstack([RAMP] * 3)]], ("left", "right"), zoom=2))
    assert (sheet[30:110, 6:94, 0] == RAMP.repeat(2, 0).repeat(2, 1)).all()
    assert (sheet[116:196, 100:188, 1] == RAMP.repeat(2, 0).repeat(2, 1)).all()
    assert (sheet[:30] < 128).any()  # the titles


def test_a_file_that_pillow_would_run_a_program_for_is_refused(tmp_path, monkeypatch):
    """EPS under a picture's name: Pillow starts Ghostscript for it, if one lets it."""
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a) or 1 / 0)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(common.UNREADABLE):
        common.read_image(tmp_path / "a.png")
    assert not started

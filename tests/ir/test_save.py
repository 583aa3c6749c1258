"""Saving: where bytes lie, what is stored once, and that the number of jobs changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from ir_jobs import FileJournal, HalveJob, halved_model, model_of, write_weights
from ir_samples import kitchen_sink, linear, same
from onnx import TensorProto, numpy_helper
from threadpoolctl import threadpool_info

from onnxslim_llm.errors import CompilerBug, ModelError, ResourceError, UsageError
from onnxslim_llm.ir.model import from_proto, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.save.layout import plan_layout
from onnxslim_llm.ir.weights import AliasWeight, ArrayWeight, ViewWeight, weight_of
from onnxslim_llm.ir.weights.jobs import TileOutput, derive

EXTERNAL = SaveOptions(external=True)


def entries(path: Path) -> dict[str, dict[str, str]]:
    """External entries by initializer, from the file as it is."""
    proto = onnx.load(path, load_external_data=False)
    return {item.name: {e.key: e.value for e in item.external_data} for item in proto.graph.initializer}


def array(count: int, start: float = 0) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.float32)


def test_small_models_are_one_file(tmp_path):
    report = save_model(model_of(ArrayWeight(array(200_000))), tmp_path / "m.onnx")
    assert report.files == [tmp_path / "m.onnx"]
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_large_models_have_a_data_file(tmp_path):
    content = array(300_000)
    report = save_model(model_of(ArrayWeight(content), ArrayWeight(array(10))), tmp_path / "m.onnx")
    assert report.files == [tmp_path / "m.onnx", tmp_path / "m.onnx.data"]
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert entries(tmp_path / "m.onnx") == {
        "w0": {"location": "m.onnx.data", "offset": "0", "length": "1200000"},
        "w1": {},
    }
    loaded = onnx.load(tmp_path / "m.onnx")
    assert np.array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), content)
    onnx.checker.check_model(str(tmp_path / "m.onnx"))


def test_alignment_and_order(tmp_path):
    sizes = [300, 20_000, 256, 255, 16_384, 300]  # of float32; 255 are less than 1 KiB and stay inline
    model = model_of(*(ArrayWeight(array(size, index)) for index, size in enumerate(sizes)))
    save_model(model, tmp_path / "m.onnx", EXTERNAL)
    found = entries(tmp_path / "m.onnx")
    assert not found["w3"]
    offsets = [int(found[f"w{index}"]["offset"]) for index in (0, 1, 2, 4, 5)]
    assert offsets == [0, 4096, 84_096 // 64 * 64, 86_016, 86_016 + 65_536]
    assert (tmp_path / "m.onnx.data").stat().st_size == offsets[-1] + 1200
    loaded = onnx.load(tmp_path / "m.onnx")
    for index, size in enumerate(sizes):
        assert np.array_equal(numpy_helper.to_array(loaded.graph.initializer[index]), array(size, index))


def test_aliases_and_equal_keys_are_stored_once(tmp_path):
    codes = ArrayWeight(np.arange(4096, dtype=np.uint8).reshape(64, 64))
    as_int4 = AliasWeight(codes, (64, 128), TensorProto.INT4)
    flat = ViewWeight.reshape(codes, (4096,))
    transposed = ViewWeight.transpose(codes)
    model = model_of(codes, as_int4, flat, transposed, ViewWeight.transpose(codes), AliasWeight(flat, (8192,), 21))
    report = save_model(model, tmp_path / "m.onnx")  # shared bytes: external although it is small
    places = [(item["offset"], item["length"]) for item in entries(tmp_path / "m.onnx").values()]
    assert places[0] == places[1] == places[2] == places[5] == ("0", "4096")
    assert places[3] == places[4] == ("4096", "4096")
    assert report.files[1].stat().st_size == 8192
    loaded = [numpy_helper.to_array(item) for item in onnx.load(tmp_path / "m.onnx").graph.initializer]
    assert np.array_equal(loaded[3], codes.view().T)
    assert np.array_equal(loaded[1], as_int4.view())
    reopened = open_model(tmp_path / "m.onnx")
    keys = [weight_of(item).storage_key for item in reopened.constants()]
    assert keys[0] == keys[1] == keys[2] == keys[5]
    assert keys[3] == keys[4] != keys[0]
    assert reopened.weight_bytes() == 8192


def test_equal_jobs_run_once(tmp_path):
    source = ArrayWeight(array(4096).reshape(64, 64))
    first, second = HalveJob(source), HalveJob(source)
    save_model(model_of(derive(first)[0], derive(second)[0]), tmp_path / "m.onnx")
    assert (first.runs, second.runs) == (1, 0)
    assert (tmp_path / "m.onnx.data").stat().st_size == 8192


def test_jobs_write_all_their_outputs_and_tell_their_statistics(tmp_path):
    source = write_weights(tmp_path / "w.bin", 3000, 1024)
    wanted = np.fromfile(tmp_path / "w.bin", np.float32).reshape(3000, 1024)
    job = HalveJob(source, "embedding")
    seen: list[tuple[int, int]] = []
    report = save_model(
        model_of(*derive(job)), tmp_path / "m.onnx", SaveOptions(jobs=2), lambda done, total: seen.append((done, total))
    )
    assert job.runs == len(job.tiles()) == 3, "the small third output comes from the same run"
    half, sums, seven = (numpy_helper.to_array(item) for item in onnx.load(tmp_path / "m.onnx").graph.initializer)
    assert np.array_equal(half, wanted.astype(np.float16))
    assert np.array_equal(sums, wanted.sum(axis=1, dtype=np.float32))
    assert seven.tolist() == [7]
    assert report.weights["embedding"]["bad"] == 0
    tiles = [wanted[tile.start : tile.stop].sum(dtype=np.float64) for tile in job.tiles()]
    assert report.weights["embedding"]["sum"] == sum(tiles)
    assert report.bytes_read == wanted.nbytes
    assert report.bytes_written == report.bytes - _gaps(tmp_path / "m.onnx")
    totals = {total for _, total in seen}
    assert totals == {(tmp_path / "m.onnx.data").stat().st_size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def _gaps(path: Path) -> int:
    places = [(int(item["offset"]), int(item["length"])) for item in entries(path).values() if item]
    return sum(offset for offset, _ in places[1:]) - sum(offset + length for offset, length in places[:-1])


def test_two_jobs_of_one_name(tmp_path):
    first, second = ArrayWeight(array(4096).reshape(64, 64)), ArrayWeight(array(4096, 1).reshape(64, 64))
    report = save_model(
        model_of(derive(HalveJob(first))[0], derive(HalveJob(second))[0]), tmp_path / "m.onnx", EXTERNAL
    )
    assert list(report.weights) == ["w", "w (2)"]
    assert report.weights["w"] != report.weights["w (2)"]


def test_no_jobs():
    with pytest.raises(UsageError, match="0 jobs"):
        SaveOptions(jobs=0)


def test_the_number_of_jobs_changes_no_byte(tmp_path):
    write_weights(tmp_path / "w.bin", 4096, 1000)
    bytes_of = []
    for jobs in (1, 2, 5):
        model = halved_model(tmp_path / "w.bin", 4, 1024, 1000)
        first = weight_of(next(model.constants())).job.inputs[0]  # type: ignore[attr-defined]
        extra = model_of(ViewWeight.transpose(first), first, ArrayWeight(array(100_000)))
        for node in extra.graph.nodes:
            node.inputs[0].name += "_plain"
            node.outputs[0].name += "_plain"
        model.graph.nodes += extra.graph.nodes
        model.graph.outputs += extra.graph.outputs
        folder = tmp_path / str(jobs)
        folder.mkdir()
        report = save_model(model, folder / "m.onnx", SaveOptions(jobs=jobs))
        bytes_of.append([file.read_bytes() for file in report.files] + [report.layout, report.weights])
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]


def test_memory_limit_bounds_what_runs_at_a_time(tmp_path):
    write_weights(tmp_path / "w.bin", 4096, 1024)
    model = halved_model(tmp_path / "w.bin", 1, 4096, 1024)
    job = weight_of(next(model.constants())).job  # type: ignore[attr-defined]
    running = most = 0
    run = job.run

    def counted(tile):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return run(tile)
        finally:
            running -= 1

    job.run, job.slow = counted, 0.01
    needed = job.tiles()[0].nbytes
    with pytest.raises(ResourceError, match=r"(?s)memory limit is \d+.*weight 'weight0'"):
        save_model(model, tmp_path / "m.onnx", SaveOptions(jobs=4, memory_limit=needed - 1))
    assert not (tmp_path / "m.onnx").exists()
    save_model(model, tmp_path / "m.onnx", SaveOptions(jobs=4, memory_limit=2 * needed))
    assert most == 2
    most = 0
    save_model(model, tmp_path / "m.onnx", SaveOptions(jobs=4))
    assert most == 4


def test_a_job_that_refuses_leaves_nothing(tmp_path):
    content = array(4096).reshape(64, 64)
    content[3, 3] = np.nan
    with pytest.raises(ModelError, match=r"(?s)1 weights are no finite.*weight 'head'"):
        save_model(model_of(derive(HalveJob(ArrayWeight(content), "head"))[0]), tmp_path / "m.onnx", EXTERNAL)
    assert os.listdir(tmp_path) == []


def test_a_job_that_writes_wrongly_is_a_bug(tmp_path):
    class Short(HalveJob):
        def run(self, tile):
            return TileOutput([(0, 0, b"x")])

    class Outside(HalveJob):
        def run(self, tile):
            return TileOutput([(0, 8191, b"xy")])

    source = ArrayWeight(array(4096).reshape(64, 64))
    with pytest.raises(CompilerBug, match="wrote 1 of 8192 bytes"):
        save_model(model_of(derive(Short(source))[0]), tmp_path / "m.onnx", EXTERNAL)
    with pytest.raises(CompilerBug, match="writes outside"):
        save_model(model_of(derive(Outside(source))[0]), tmp_path / "m.onnx", EXTERNAL)
    assert os.listdir(tmp_path) == []


def test_a_model_may_be_saved_over_its_own_files(tmp_path):
    path = tmp_path / "m.onnx"
    save_model(model_of(ArrayWeight(array(300_000)), ArrayWeight(array(300_000, 5))), path)
    model = open_model(path)
    model.graph.nodes[0].inputs[0], model.graph.nodes[1].inputs[0] = (
        model.graph.nodes[1].inputs[0],
        model.graph.nodes[0].inputs[0],
    )
    del model.graph.nodes[1].outputs[0], model.graph.outputs[1], model.graph.nodes[1]
    save_model(model, path)
    loaded = onnx.load(path)
    assert [item.name for item in loaded.graph.initializer] == ["w1"]
    assert np.array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), array(300_000, 5))


def test_saving_twice_gives_equal_files_and_compiling_ones_own_output_changes_nothing(tmp_path):
    proto = kitchen_sink()
    proto.graph.initializer.append(numpy_helper.from_array(array(300_000), "big"))
    model = from_proto(proto)
    first = save_model(model, tmp_path / "a.onnx")
    again = save_model(open_model(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert first.layout == again.layout
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()
    saved = (tmp_path / "a.onnx").read_bytes()
    assert saved.replace(b"a.onnx", b"b.onnx") == (tmp_path / "b.onnx").read_bytes()
    assert same(open_model(tmp_path / "a.onnx").to_proto(), proto)


def test_subgraph_initializers_go_into_the_data_file(tmp_path):
    proto = kitchen_sink()
    branch = proto.graph.node[2].attribute[0].g
    branch.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((300, 4), np.float32), "bias"))
    save_model(from_proto(proto), tmp_path / "m.onnx", EXTERNAL)
    inner = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.node[2].attribute[0].g.initializer[0]
    assert inner.data_location == TensorProto.EXTERNAL
    assert same(open_model(tmp_path / "m.onnx").to_proto(), proto)


def test_external_false_keeps_all_inside(tmp_path):
    shared = ArrayWeight(array(300_000))
    report = save_model(model_of(shared, shared), tmp_path / "m.onnx", SaveOptions(external=False))
    assert len(report.files) == 1
    assert report.bytes > 2_400_000


def test_more_than_2_gib_inline_is_refused(tmp_path):
    class Huge(ArrayWeight):
        nbytes = property(lambda self: 3 << 30, lambda self, value: None)  # type: ignore[assignment]

    model = model_of(Huge(array(4)))
    with pytest.raises(ModelError, match="2 GiB"):
        model.to_proto()
    with pytest.raises(ModelError, match="2 GiB"):
        save_model(model, tmp_path / "m.onnx", SaveOptions(external=False))


def test_fsync_is_asked_for(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    save_model(model_of(ArrayWeight(array(300_000))), tmp_path / "a.onnx")
    assert not synced
    save_model(model_of(ArrayWeight(array(300_000))), tmp_path / "b.onnx", SaveOptions(fsync=True))
    assert len(synced) == 3, "data, model, folder"


def test_a_changed_source_file_is_noticed(tmp_path):
    source = write_weights(tmp_path / "w.bin", 1024, 300)
    write_weights(tmp_path / "w.bin", 1024, 300, seed=1)
    os.utime(tmp_path / "w.bin", ns=(1, 1))
    with pytest.raises(ResourceError, match="has changed since"):
        save_model(model_of(source), tmp_path / "m.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ResourceError, match="cannot read a weight file"):
        save_model(model_of(source), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_relative_paths_survive_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    save_model(model_of(ArrayWeight(array(300_000))), "a/m.onnx", SaveOptions(external=False))
    model = open_model("a/m.onnx")
    monkeypatch.chdir("/")
    save_model(model, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.data").read_bytes() == array(300_000).tobytes()


def test_layout_needs_no_data_and_no_work(tmp_path):
    source = write_weights(tmp_path / "w.bin", 1024, 300)
    job = HalveJob(source)
    model = model_of(*derive(job), source)
    (tmp_path / "w.bin").unlink()
    layout = plan_layout(model)
    assert [(region.offset, region.nbytes) for region in layout.regions.values()] == [
        (0, 614_400),
        (614_400, 4096),
        (618_496, 1_228_800),
    ]
    assert job.runs == 0


def test_resume_skips_what_is_done_only_if_it_is_the_same_work(tmp_path):
    write_weights(tmp_path / "w.bin", 4096, 300)
    out = tmp_path / "m.onnx"

    def save(journal: FileJournal, fail: bool = False, fingerprint: str = "halve 1") -> tuple[list[str], int]:
        jobs = []
        weights = []
        for index in range(4):
            source = write_weights(tmp_path / f"w{index}.bin", 1024, 300, index) if first else sources[index]
            sources.append(source)
            job = HalveJob(source, f"weight{index}")
            job.fingerprint = fingerprint
            jobs.append(job)
            weights += derive(job)[:2]
        if fail:
            jobs[2].run = lambda tile: (_ for _ in ()).throw(ModelError("stop"))  # type: ignore[method-assign]
            with pytest.raises(ModelError, match="stop"):
                save_model(model_of(*weights), out, journal=journal)
            return [], 0
        report = save_model(model_of(*weights), out, journal=journal)
        assert list(report.weights) == ["weight0", "weight1", "weight2", "weight3"], "statistics are complete"
        return report.resumed, sum(job.runs for job in jobs)

    sources: list = []
    first = True
    assert save(FileJournal(tmp_path / "j0")) == ([], 4)
    wanted = [(tmp_path / name).read_bytes() for name in ("m.onnx", "m.onnx.data")]
    out.unlink()
    (tmp_path / "m.onnx.data").unlink()
    first = False
    save(FileJournal(tmp_path / "j1"), fail=True)
    assert not out.exists()
    assert (tmp_path / "m.onnx.data.partial").exists(), "kept for the next run"
    assert save(FileJournal(tmp_path / "j1")) == (["weight0", "weight1"], 2)
    assert [(tmp_path / name).read_bytes() for name in ("m.onnx", "m.onnx.data")] == wanted
    # The data file was complete and in place, but the run ended before it was published.
    out.unlink()
    assert save(FileJournal(tmp_path / "j1")) == (["weight0", "weight1", "weight2", "weight3"], 0)
    assert [(tmp_path / name).read_bytes() for name in ("m.onnx", "m.onnx.data")] == wanted
    # Other work under the same names is done again.
    assert save(FileJournal(tmp_path / "j1"), fingerprint="halve 2") == ([], 4)


def test_a_partial_file_of_other_work_leaves_no_traces(tmp_path):
    source = write_weights(tmp_path / "w.bin", 100, 300)  # ends 128 bytes before the next page
    model = model_of(*derive(HalveJob(source, "w"))[:1], ArrayWeight(array(100_000)))
    save_model(model, tmp_path / "a.onnx", EXTERNAL)
    (tmp_path / "b.onnx.data.partial").write_bytes(b"x" * (tmp_path / "a.onnx.data").stat().st_size)
    save_model(model, tmp_path / "b.onnx", EXTERNAL, journal=FileJournal(tmp_path / "j"))
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()


def test_a_job_with_a_small_output_is_not_skipped(tmp_path):
    source = write_weights(tmp_path / "w.bin", 1024, 300)
    save_model(model_of(*derive(HalveJob(source))), tmp_path / "m.onnx", journal=FileJournal(tmp_path / "j"))
    wanted = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").unlink()
    job = HalveJob(source)
    report = save_model(model_of(*derive(job)), tmp_path / "m.onnx", journal=FileJournal(tmp_path / "j"))
    assert report.resumed == []
    assert job.runs == 1, "its small output lies in the model file, which is not resumed"
    assert (tmp_path / "m.onnx").read_bytes() == wanted


def test_inline_copy_of_a_proto_model_with_typed_data(tmp_path):
    proto = linear(onnx.helper.make_tensor("w", TensorProto.FLOAT, [300_000], array(300_000)))
    save_model(from_proto(proto), tmp_path / "m.onnx")
    loaded = onnx.load(tmp_path / "m.onnx").graph.initializer[0]
    assert loaded.raw_data == array(300_000).tobytes()


def test_save_from_gs_edited_graph(tmp_path):
    model = from_proto(linear(array(6)))
    graph = model.graph
    ones = gs.Constant("ones", np.ones(6, np.float32))
    out = gs.Variable("z", np.float32, [6])
    graph.nodes.append(gs.Node("Add", "add", inputs=[graph.outputs[0], ones], outputs=[out]))
    graph.outputs = [out]
    save_model(model, tmp_path / "m.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)


def test_matrix_products_of_a_piece_run_in_one_thread(tmp_path, monkeypatch):
    before = _blas_threads()
    seen = []
    run = HalveJob.run

    def watched(job, tile):
        seen.append(_blas_threads())
        return run(job, tile)

    monkeypatch.setattr(HalveJob, "run", watched)
    write_weights(tmp_path / "w.bin", 64, 64)
    save_model(halved_model(tmp_path / "w.bin", 1, 64, 64), tmp_path / "m.onnx", SaveOptions(jobs=2, external=True))
    assert seen
    assert all(set(threads) <= {1} for threads in seen)
    assert _blas_threads() == before


def _blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

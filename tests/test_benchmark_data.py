"""The benchmark of loading images runs, and writes its report."""

import json

import torch
from samples import RGB, box, make_coco

import benchmark_data


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    (tmp_path / "train").mkdir()
    for i in range(1, 5):
        RGB.save(tmp_path / "train" / f"{i}.png")
    coco = make_coco([box(i, id=i) for i in range(1, 5)], images=4)
    (tmp_path / "train" / "_annotations.coco.json").write_text(json.dumps(coco))
    config = benchmark_data.BenchmarkConfig(
        tmp_path, batch_size=2, rounds=1, min_size=60, max_size=100, out=tmp_path / "out" / "report.json"
    )
    report = benchmark_data.main(config)
    assert json.loads(config.out.read_text()) == report
    rows = [row for title in list(report)[:2] for row in report[title].values()]
    assert len(rows) == 8 and all(row["median"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 10

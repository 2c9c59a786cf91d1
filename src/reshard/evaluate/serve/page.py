"""The page at `/`: runs, their metrics over the steps, and jobs with the ends of their logs. Nothing but text goes in.

It is made here as a whole, works without JavaScript, and asks for its own middle every few seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

from reshard.evaluate.metrics import metric_name
from reshard.evaluate.records import Job
from reshard.evaluate.serve.plot import number, plot
from reshard.evaluate.serve.protocol import status_of

_REFRESH_S = 3
MOST_JOBS = 60
"""That ended, on one page."""
MOST_WAITING = 20
MOST_MEASURED = 500
"""The newest of those that completed: what the plots are made of."""
STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --soft: #667; --line: #d5dae1; --back: #fff; --card: #f6f8fa;
  --one: #1f6feb; --two: #c2571a; --good: #1a7f37; --bad: #cf222e; --busy: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #333b46; --back: #14181d;
  --card: #1b2027; --one: #6cb0ff; --two: #ffa657; --good: #57d275; --bad: #ff7b72; --busy: #e3b341; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 16px; max-width: 1100px; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
header { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline }
h1 { font-size: 20px; margin: 0 } h2 { font-size: 16px; margin: 24px 0 8px; overflow-wrap: anywhere }
.soft { color: var(--soft); font-size: 13px }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 12px }
figure { margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 8px; font-size: 13px;
  overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto } svg text { font-size: 10px; fill: var(--soft) }
.axis, .grid { stroke: var(--line) } .grid { stroke-dasharray: 2 3 }
polyline { fill: none; stroke: var(--one); stroke-width: 2 } circle { fill: var(--one) }
.ema polyline { stroke: var(--two) } .ema circle { fill: var(--two) } b.ema { color: var(--two) }
b.regular { color: var(--one) }
details { border-top: 1px solid var(--line) } summary { display: flex; flex-wrap: wrap; gap: 2px 12px; padding: 7px 0;
  cursor: pointer } summary > span { overflow-wrap: anywhere } .what { flex: 1 1 100px }
.status { min-width: 88px; font-weight: 600 } .completed { color: var(--good) } .failed { color: var(--bad) }
.running { color: var(--busy) } .queued, .cancelled { color: var(--soft) }
pre { margin: 0 0 10px; padding: 10px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; max-height: 320px }
"""
SCRIPT = f"""
let opened = new Map();
async function refresh() {{
  try {{
    const query = new URLSearchParams(location.search);
    query.set("part", "main");
    const answer = await fetch("?" + query, {{cache: "no-store"}});
    if (answer.ok) {{
      const main = document.querySelector("main");
      main.querySelectorAll("details").forEach(d => opened.set(d.id, d.open));
      main.innerHTML = await answer.text();
      main.querySelectorAll("details").forEach(d => {{ if (opened.has(d.id)) d.open = opened.get(d.id); }});
      main.querySelectorAll("pre").forEach(p => {{ p.scrollTop = p.scrollHeight; }});
    }}
    document.querySelector("#state").textContent = answer.ok ? "" : "the server refuses: " + answer.status;
  }} catch (error) {{ document.querySelector("#state").textContent = "the server does not answer"; }}
  setTimeout(refresh, {_REFRESH_S * 1000});
}}
setTimeout(refresh, {_REFRESH_S * 1000});
"""


@dataclass(frozen=True, slots=True)
class Shown:
    """A job, and the end of its log."""

    job: Job
    log: str


def page(main: str, backend: str, nonce: str) -> str:
    """The whole page around its middle."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>reshard serve</title><style nonce="{nonce}">{STYLE}</style>
<noscript><meta http-equiv="refresh" content="{_REFRESH_S * 3}"></noscript></head>
<body><header><h1>reshard serve</h1><span class="soft">{escape(backend)}</span><span class="failed" id="state"></span>
</header><main>{main}</main><script nonce="{nonce}">{SCRIPT}</script></body></html>
"""


def main_part(
    counts: Mapping[str, int], measured: Sequence[Job], jobs: Sequence[Shown], earlier: int | None = None
) -> str:
    """What changes: how many jobs there are, the runs' metrics, and some jobs. `earlier` begins the next page."""
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no job yet"
    left_out = f"; the plots are of the newest {len(measured)}" if counts["completed"] > MOST_MEASURED else ""
    rest = "" if earlier is None else f'<p class="soft"><a href="?before={earlier}">earlier</a></p>'
    runs = "".join(_run(run, its) for run, its in _by_run(measured).items())
    return f'<p class="soft">{said}{left_out}</p>{runs}<h2>Jobs</h2>{"".join(map(_job, jobs))}{rest}'


def _by_run(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    runs: dict[str, list[Job]] = {}
    for job in jobs:
        runs.setdefault(job.run, []).append(job)
    return runs


def _run(run: str, jobs: Sequence[Job]) -> str:
    """A run: a plot for every metric. Of a step that was measured twice the later counts."""
    metrics: dict[str, dict[str, dict[int, float]]] = {}
    for job in sorted(jobs, key=lambda job: job.id):
        for metric in job.payload.get("metrics") or ():
            name = metric_name(metric["task"], metric["metric"], metric["filter"])
            metrics.setdefault(name, {}).setdefault(job.kind, {})[job.step] = float(metric["value"])
    figures = "".join(_figure(name, metrics[name]) for name in sorted(metrics))
    return f'<section><h2>{escape(run)}</h2><div class="plots">{figures}</div></section>'


def _figure(name: str, lines: Mapping[str, Mapping[int, float]]) -> str:
    last = " ".join(
        f'<b class="{escape(kind)}">{number(points[max(points)])}</b>{" ema" if kind == "ema" else ""}'
        for kind, points in sorted(lines.items(), reverse=True)
    )
    drawn = plot(name, {kind: list(points.items()) for kind, points in lines.items()})
    return f"<figure><figcaption><span>{escape(name)}</span><span>{last}</span></figcaption>{drawn}</figure>"


def _job(shown: Shown) -> str:
    job = shown.job
    status = status_of(job)
    request = job.payload["request"]
    step = (f"step {job.step}" if job.step >= 0 else "") + (f" {job.kind}" if job.kind != "regular" else "")
    when = datetime.fromtimestamp(job.changed if job.is_final else job.created).strftime("%m-%d %H:%M")
    what = ", ".join(map(str, request["tasks"]))
    about = job.payload["source"] or job.payload["model"]
    texts = [about, job.reason if status == "failed" else "", shown.log]
    text = "\n\n".join(text for text in texts if text)
    return (
        f'<details id="job-{escape(job.fingerprint)}"{" open" if status == "running" else ""}>'
        f'<summary><span class="status {status}">{status}</span><span>{step}</span>'
        f'<span class="what">{escape(what)}</span><span class="soft">{when}</span></summary>'
        f"<pre>{escape(text)}</pre></details>"
    )

#!/usr/bin/env python3
"""The curves of a run's report as one SVG picture, for a README.

    tools/curves.py runs/quickstart/report.html docs/quickstart.svg
"""
import pathlib, re, sys

page = pathlib.Path(sys.argv[1]).read_text()
figures = re.findall(r"<figcaption>(.*?)</figcaption><svg viewBox=\"0 0 (\d+) (\d+)\"[^>]*>(.*?)</svg>", page, re.S)
width, height = int(figures[0][1]), int(figures[0][2]) + 30
colours = {"a": "#2563eb", "b": "#0f766e", "c": "#dc2626", "d": "#a16207"}
style = "text{font:12px sans-serif;fill:#444}.title{font-weight:bold}.grid{stroke:#ddd}.zero{stroke:#888}polyline{fill:none}"
style += "".join(f"polyline.{name}{{stroke:{c}}}circle.{name}{{fill:{c}}}" for name, c in colours.items())
columns = 2
rows = -(-len(figures) // columns)
out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {rows * height}"><style>{style}</style>',
       '<rect width="100%" height="100%" fill="#fff"/>']
for i, (title, _, _, body) in enumerate(figures):
    x, y = i % columns * width, i // columns * height
    out.append(f'<g transform="translate({x},{y + 24})"><text class="title" x="56" y="-6">{title}</text>{body}</g>')
pathlib.Path(sys.argv[2]).write_text("\n".join(out) + "\n</svg>\n")

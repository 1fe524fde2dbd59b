"""The style of the page of a report."""

STYLE = """\
:root {
  --page: #faf9f6;
  --surface: #ffffff;
  --sunken: #f3f1ec;
  --text: #1f1e1b;
  --quiet: #68645b;
  --rule: #e4e0d8;
  --accent: #1f5fa8;
  --good: #1d64ad;
  --bad: #b63a08;
  --marked: #fff4d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141518;
    --surface: #1b1d21;
    --sunken: #23262b;
    --text: #e7e5df;
    --quiet: #9d9a92;
    --rule: #2f3238;
    --accent: #82b4f0;
    --good: #7db6ee;
    --bad: #f39a68;
    --marked: #3a3420;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto;
  max-width: 1180px;
  padding: 20px 24px 48px;
  background: var(--page);
  color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
h1 { margin: 0 0 14px; font-size: 24px; line-height: 1.25; text-wrap: balance; }
h2 { margin: 0 0 12px; font-size: 18px; }
h3 { margin: 18px 0 8px; font-size: 15px; }
p { margin: 0 0 8px; }
section { margin-top: 36px; }
.kicker { color: var(--quiet); font-size: 13px; margin-bottom: 2px; }
.quiet { color: var(--quiet); font-size: 13px; max-width: 84ch; }
.notice { padding: 10px 14px; border-left: 4px solid var(--bad); border-radius: 0 6px 6px 0; background: var(--surface); }
.first { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.15fr); gap: 20px; align-items: start; margin-top: 8px; }
.first + .first { margin-top: 32px; }
.card { margin-bottom: 12px; padding: 12px 16px; border: 1px solid var(--rule); border-left: 5px solid var(--quiet); border-radius: 8px; background: var(--surface); }
.card h2 { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; margin-bottom: 4px; font-size: 15px; }
.card p { font-size: 16px; font-weight: 550; }
.card ul { margin: 0 0 6px; padding-left: 18px; color: var(--quiet); font-size: 13px; }
.card p.quiet { margin: 0; font-size: 13px; font-weight: 400; }
.chip { padding: 0 9px; border: 1px solid currentColor; border-radius: 99px; color: var(--quiet); font-size: 12px; font-weight: 600; }
.yes { border-left-color: var(--bad); }
.yes .chip { color: var(--bad); }
.no { border-left-color: var(--good); }
.no .chip { color: var(--good); }
figure { margin: 0; padding: 12px 14px; border: 1px solid var(--rule); border-radius: 8px; background: var(--surface); }
figcaption { margin-bottom: 8px; font-weight: 550; }
picture, img { display: block; width: 100%; height: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 16px; margin-bottom: 14px; }
.pair { display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); gap: 16px; align-items: start; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; background: var(--surface); }
.scroll + :is(p, details) { margin-top: 8px; }
table { border-collapse: collapse; min-width: 100%; font-size: 13px; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child, .settings :is(th, td) { text-align: left; }
.settings td { min-width: 12em; max-width: 28em; white-space: normal; }
thead th { color: var(--quiet); font-weight: 500; background: var(--sunken); }
tbody th { font-weight: 550; }
.differs > * { background: var(--marked); }
details { margin-bottom: 8px; }
summary { padding: 6px 0; cursor: pointer; font-weight: 550; }
@media (max-width: 820px) {
  body { padding: 14px 14px 32px; }
  h1 { font-size: 21px; }
  .first, .pair { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  figure { padding: 10px 8px; }
  .settings tbody th { white-space: normal; overflow-wrap: break-word; }
}
@media print {
  body { max-width: none; }
  figure, .card, table { break-inside: avoid; }
}
"""

"""The style and the script of the page of `shardserve inspect --html`."""

STYLE = """
:root { --back: #fff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --box: #cfe3f8; --edge: #4a7fb5; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181d; --text: #e6e9ec; --soft: #9aa4ae; --line: #353c44; --box: #1f3d5c; --edge: #6ea8e0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem; }
p, ul { margin: .4rem 0; }
ul { padding-left: 1.2rem; }
li, p { overflow-wrap: anywhere; }
code { font: .9em ui-monospace, monospace; }
.note { color: var(--soft); font-size: .875rem; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; }
svg rect { fill: var(--box); stroke: var(--edge); }
svg line { stroke: var(--edge); }
svg marker path { fill: var(--edge); }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg .stage { font-weight: 600; }
svg .small { fill: var(--soft); }
svg .in { text-anchor: middle; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--back); }
.n { text-align: right; font-variant-numeric: tabular-nums; }
input { width: 100%; max-width: 24rem; padding: .5rem; font: inherit; color: inherit; background: transparent;
  border: 1px solid var(--line); border-radius: .3rem; }
tr[hidden] { display: none; }
"""

SCRIPT = """
const search = document.getElementById("search");
const count = document.getElementById("count");
const rows = [...document.querySelectorAll("#parameters tbody tr")];
search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = words.length ? `${shown} of ${rows.length} parameters` : `${rows.length} parameters`;
});
"""

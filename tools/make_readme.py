"""Write README.md from nbs/index.ipynb, and nbs/llms.txt from the titles of all notebooks

    python tools/make_readme.py            # write README.md, its pictures into index_files/, and nbs/llms.txt
    python tools/make_readme.py --check    # write nothing; fail and show a diff if they differ

`nbdev-readme` does this with Quarto, which pip cannot install. Here nbdev's own processors take out what its directives
hide, and Pandoc, which pip can install, writes the Markdown. Stored outputs are used as they are: nothing is run.
"""
import argparse, difflib, json, os, posixpath, re, shutil, sys

from nbdev.config import get_config
from nbdev.readme_filter import doc_link
from notebooks import about, cell_md, lookup, pandoc, processed, relocate, root, sidebar, nbs, tree_of

pictures = 'index_files'  # in the root, as `nbdev-readme` has it

def target(url):
    "Address from README.md of what index.ipynb links to as `url`: pages to the docs, files to the file"
    url = doc_link(url, get_config().doc_url)
    return url if re.match(r'\w+:|#|/', url) else posixpath.normpath(posixpath.join('nbs', url))

def table(html): return pandoc(html, 'gfm', 'html-native_divs-native_spans')

def make_llms():
    "Text of nbs/llms.txt: what each page of the docs is about, with a link to its Markdown, in the order of the sidebar"
    title, description = about('index.ipynb')
    parts = [f'# {title}', f'> {description}']
    for section, paths in sidebar():
        paths = [o for o in paths if (nbs/o).exists()]
        rows = (f'- [{t}]({doc_link(o, get_config().doc_url)}.md)' + (f': {d}' if d else '') for o in paths for t,d in [about(o)])
        parts.append('\n'.join([f'## {section or "Overview"}\n', *rows]))
    return '\n\n'.join(parts) + '\n'

def make_readme():
    "Path -> bytes of README.md, its pictures and nbs/llms.txt"
    nb, links, files = processed('index.ipynb'), lookup(), {}
    title, description = about('index.ipynb')
    parts = [f'# {title}', f'> {description}' if description else '']
    for cell in nb.cells: parts += cell_md(cell, f'../{pictures}/', files, links, table)  # from nbs/, as the author's own pictures
    tree = tree_of(parts, 'gfm')
    relocate(tree['blocks'], target)
    text = pandoc(json.dumps(tree), 'gfm', 'json')
    text = re.sub(r'^( *`{3,}) (\w+)$', r'\1\2', text, flags=re.M)  # Pandoc writes "``` python"
    return {'README.md': text.encode(), 'nbs/llms.txt': make_llms().encode(), **{target(k):v for k,v in files.items()}}

def present():
    "What `make_readme` would give, as it is on disk"
    paths = [root/'README.md', nbs/'llms.txt', *(root/pictures).glob('*')]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths if p.exists()}

def check(new, old, n=40):
    stale = sorted(o for o in new.keys() | old.keys() if new.get(o)!=old.get(o))
    if not stale: return print('README.md and llms.txt agree with the notebooks')
    diff = []
    for o in ('README.md', 'nbs/llms.txt'):
        a, b = (d.get(o, b'').decode().splitlines() for d in (old, new))
        diff += difflib.unified_diff(a, b, o, 'from the notebooks', lineterm='', n=1)
    sys.exit('\n'.join([f'Out of sync with the notebooks: {", ".join(stale)}. Run `make readme`', *diff[:n],
                        *([f'... {len(diff)-n} lines more'] if len(diff)>n else [])]))

def write(new):
    shutil.rmtree(root/pictures, ignore_errors=True)  # with the pictures of outputs that are gone
    for path, data in new.items():
        (root/path).parent.mkdir(exist_ok=True)
        (root/path).write_bytes(data)

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; fail and show a diff if they differ')
    args = parser.parse_args()
    os.chdir(root)  # nbdev looks for its settings from the working directory
    check(make_readme(), present()) if args.check else write(make_readme())

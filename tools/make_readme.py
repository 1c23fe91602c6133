"""Write README.md from nbs/index.ipynb

    python tools/make_readme.py            # write README.md, and its pictures into index_files/
    python tools/make_readme.py --check    # write nothing; fail and show a diff if they differ

`nbdev-readme` does this with Quarto, which pip cannot install. Here nbdev's own processors take out what its directives
hide, and Pandoc, which pip can install, writes the Markdown. Stored outputs are used as they are: nothing is run.
"""
import argparse, base64, difflib, json, os, posixpath, re, runpy, shutil, sys
from pathlib import Path
from urllib.parse import urljoin

import pypandoc
from nbdev import processors as P
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.readme_filter import doc_link

root = Path(__file__).resolve().parent.parent
pictures = 'index_files'  # in the root, as `nbdev-readme` has it
image_types = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}

def pandoc(text, to, fmt): return pypandoc.convert_text(text, to, format=fmt, extra_args=['--wrap=none'])

def fenced(text, lang=''):
    fence = '`' * max([3, *(len(o)+1 for o in re.findall('`{3,}', text))])  # longer than any fence inside
    return f'{fence}{lang}\n{text.rstrip()}\n{fence}'

def lookup():
    """nbdev's links from symbols to docs, for our symbols alone and from this checkout

    By itself nbdev takes them from every installed package, so that README.md would depend on what is installed."""
    links = NbdevLookup(incl_libs=('fastbyol',))
    modules = runpy.run_path(str(root/'fastbyol/_modidx.py'))['d']['syms']
    doc_url = get_config().doc_url
    links.syms = {}
    for module, syms in modules.items():
        for name, (page, _) in syms.items():
            for o in (name, name.removeprefix(f'{module}.')): links.syms.setdefault(o, urljoin(doc_url, page))
    return links

def processed():
    "The notebook without what its directives hide, as in the docs"
    procs = [FrontmatterProc, P.populate_language, P.strip_ansi, P.hide_line, P.filter_stream_, P.rm_header_dash,
             P.rm_export, P.clean_magics, P.hide_]
    return NBProcessor(root/'nbs/index.ipynb', procs, process=True).nb

def output_md(out, name, files, links):
    "Markdown of one stored output; a picture goes into `files` as `name`"
    if out.output_type=='stream':  # a progress bar writes over its line: keep what was left to see
        return fenced('\n'.join(o.split('\r')[-1] for o in out.text.rstrip().split('\n')))
    if out.output_type=='error': return fenced(f'{out.ename}: {out.evalue}')
    data = out.data
    if 'text/markdown' in data: return links.linkify(data['text/markdown'])
    for mime, suffix in image_types.items():
        if mime not in data: continue
        path = f'{pictures}/{name}.{suffix}'
        files[path] = data[mime].encode() if suffix=='svg' else base64.b64decode(data[mime])
        return f'![](../{path})'  # from nbs/, as the author's own pictures
    if 'text/html' in data:  # a table, in what pandas and fastprogress wrap around it
        html = re.sub(r'<(style|script).*?</\1>', '', data['text/html'], flags=re.S)
        return pandoc(html, 'gfm', 'html-native_divs-native_spans')
    return fenced(data['text/plain']) if 'text/plain' in data else ''

def cell_md(cell, files, links):
    if cell.cell_type=='markdown':
        if cell.get('attachments'): raise ValueError(f'Cell {cell.id} has a pasted picture: save it in nbs/images/ and link to it')
        yield links.linkify(cell.source)
    if cell.cell_type!='code': return
    off = lambda key: cell.directives_.get(key)=='false'
    if off('include'): return
    if not off('echo') and cell.source.strip(): yield fenced(cell.source, cell.metadata.language)
    if off('output'): return
    for i, out in enumerate(cell.outputs): yield output_md(out, f'{cell.id}-{i}', files, links)

def relocate(node, doc_url):
    "Point the links and pictures of a Pandoc tree, written in nbs/, from README.md: pages to the docs, files to the file"
    def target(url):
        url = doc_link(url, doc_url)
        return url if re.match(r'\w+:|#|/', url) else posixpath.normpath(posixpath.join('nbs', url))
    if isinstance(node, list):
        for o in node: relocate(o, doc_url)
    elif isinstance(node, dict):
        if node.get('t') in ('Link', 'Image'): node['c'][2][0] = target(node['c'][2][0])
        if node.get('t') in ('RawInline', 'RawBlock'):
            node['c'][1] = re.sub(r'((?:src|href)=")([^"]+)', lambda m: m[1]+target(m[2]), node['c'][1])
        for o in node.values(): relocate(o, doc_url)

def make_readme():
    "Path -> bytes of README.md and its pictures"
    nb, links, files = processed(), lookup(), {}
    about = nb.frontmatter_
    parts = [f'# {about["title"]}', f'> {about["description"]}' if 'description' in about else '']
    for cell in nb.cells: parts += cell_md(cell, files, links)
    tree = json.loads(pandoc('\n\n'.join(o.strip('\n') for o in parts if o.strip()), 'json', 'gfm'))
    relocate(tree['blocks'], get_config().doc_url)
    text = pandoc(json.dumps(tree), 'gfm', 'json')
    text = re.sub(r'^( *`{3,}) (\w+)$', r'\1\2', text, flags=re.M)  # Pandoc writes "``` python"
    return {'README.md': text.encode(), **files}

def present():
    "What `make_readme` would give, as it is on disk"
    paths = [root/'README.md', *(root/pictures).glob('*')]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths if p.exists()}

def check(new, old, n=40):
    stale = sorted(o for o in new.keys() | old.keys() if new.get(o)!=old.get(o))
    if not stale: return print('README.md agrees with nbs/index.ipynb')
    a, b = (d.get('README.md', b'').decode().splitlines() for d in (old, new))
    diff = list(difflib.unified_diff(a, b, 'README.md', 'nbs/index.ipynb', lineterm='', n=1))
    sys.exit('\n'.join([f'Out of sync with nbs/index.ipynb: {", ".join(stale)}. Run `make readme`', *diff[:n],
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

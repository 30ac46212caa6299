// The server has the data: arrays are fetched once, rows of a latent each time (folder.py says how they lie).
async function bytesOf(address) {
  let response;
  try {
    response = await fetch(`${page.build}/${address}`);
  } catch {
    throw new Error("The server does not answer. Start saekit report --serve again, and reload this page.");
  }
  if (!response.ok) throw new Error("The server shows another report now. Reload this page.");
  return response.arrayBuffer();
}

const fetched = once(async (layer, name) => {
  const { type, width } = page.layers[layer].columns.find((column) => column.name === name);
  return { values: new TYPES[type](await bytesOf(`layers/${layer}/columns/${name}`)), width };
});
const text = once(async () => ({ values: new TYPES[page.text.type](await bytesOf("text")), width: page.text.width }));
const source = {
  text,
  async columns(layer, names) {
    const there = names.filter((name) => page.layers[layer].columns.some((column) => column.name === name));
    return Object.fromEntries(await Promise.all(there.map(async (name) => [name, await fetched(layer, name)])));
  },
  async row(layer, place) {
    const bytes = await bytesOf(`layers/${layer}/rows/${place}`);
    const arrays = {};
    let start = 0;
    for (const { name, type, width } of page.layers[layer].columns.filter((column) => column.in_row)) {
      const end = start + width * TYPES[type].BYTES_PER_ELEMENT;
      arrays[name] = new TYPES[type](bytes.slice(start, end));
      start = end;
    }
    return arrays;
  },
};

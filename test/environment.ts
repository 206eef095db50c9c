/** What processes of a test find in their environment. */

/** Settings of whoever runs the tests must not reach them, nor weights that are kept for them. */
export const cleanEnvironment: NodeJS.ProcessEnv = {
  ...Object.fromEntries(
    Object.entries(process.env).filter(([name]) => !name.startsWith('CARAVAN_')),
  ),
  CARAVAN_WEIGHT_CACHE: 'off',
};

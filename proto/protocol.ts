/** Version of cluster.proto's meaning: raised whenever two releases must not share a group. */
export const PROTOCOL = 6;
